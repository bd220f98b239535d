"""Vocabulary mappers computed the slow way: every token against every other, with no cleverness at all.

Written from the definitions, not from the code under test: it shares nothing with get_vocab_mapper but the
`TokenForms` that both take.
"""

ROLES = ("eos", "bos", "pad", "unk")


def levenshtein(a: str, b: str) -> int:
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        current = [i]
        for j, y in enumerate(b, start=1):
            current.append(min(previous[j] + 1, current[j - 1] + 1, previous[j - 1] + (x != y)))
        previous = current
    return previous[-1]


def common_prefix(a: str, b: str) -> int:
    length = 0
    while length < min(len(a), len(b)) and a[length] == b[length]:
        length += 1
    return length


def read(form: bytes) -> str:
    try:
        return form.decode("utf-8")
    except UnicodeDecodeError:
        return form.decode("latin-1")


def role_pairs(teacher, student) -> list[tuple[int, int]]:
    pairs = []
    for role in ROLES:
        if role in teacher.roles and role in student.roles:
            v, u = teacher.roles[role], student.roles[role]
            if all(v != taken_v and u != taken_u for taken_v, taken_u in pairs):
                pairs.append((v, u))
    return pairs


def preference(side, u: int) -> tuple[bool, int]:
    """Of several tokens that are equal in all else, the one where this is smallest is taken."""
    return bool(side.is_byte_fallback[u]), u


def exact(side, other, pairs: list[tuple[int, int]]) -> list[int]:
    """For each token of `side` its exact match or -1; `pairs` are the role matches as (side, other)."""
    result = []
    for v in range(len(side.forms)):
        by_role = [u for w, u in pairs if w == v]
        by_text = [
            u
            for u in range(len(other.forms))
            if side.forms[v] == other.forms[u]
            and side.forms[v] != b""
            and side.is_special[v] == other.is_special[u]
            and u not in [taken for _, taken in pairs]
        ]
        by_text.sort(key=lambda u: preference(other, u))
        result.append([*by_role, *by_text, -1][0])
    return result


def mined_choice(text: str, candidates: list[tuple], distance=levenshtein) -> tuple:
    """(preference, distance) of the nearest of the candidates (preference, text), with all tie rules."""
    measured = []
    for preferred, candidate in candidates:
        lev = distance(text, candidate)
        measured.append((lev, abs(len(text) - len(candidate)), -common_prefix(text, candidate), preferred))
    lev, _, _, preferred = min(measured)
    return preferred, lev


def static_map(kind: str, teacher, student, distance=levenshtein) -> tuple[list[int], list[int]]:
    """The static maps of a mapper of this kind: the student id or -1 of each teacher id, and the other way round."""
    pairs = role_pairs(teacher, student)
    forward = exact(teacher, student, pairs)
    backward = exact(student, teacher, [(u, v) for v, u in pairs])
    if kind == "em":
        return forward, backward

    candidates = [u for u in range(len(student.forms)) if not student.is_special[u]]
    cost = {}  # inexact teacher token -> the smaller, the rather it is its student token's inverse
    for v in range(len(teacher.forms)):
        if forward[v] != -1 or teacher.is_special[v]:
            continue
        if kind == "mined" and candidates:
            texts = [(preference(student, u), read(student.forms[u])) for u in candidates]
            (_, forward[v]), cost[v] = mined_choice(read(teacher.forms[v]), texts, distance)
        if kind == "prefixem":
            form = teacher.forms[v]
            prefixes = [
                (-len(student.forms[u]), preference(student, u), u)
                for u in candidates
                if student.forms[u] and form.startswith(student.forms[u]) and form != student.forms[u]
            ]
            if prefixes:
                cost[v], _, forward[v] = min(prefixes)
    for u in range(len(student.forms)):
        if backward[u] == -1:
            rivals = [(cost[v], preference(teacher, v), v) for v in cost if forward[v] == u]
            backward[u] = min(rivals)[2] if rivals else -1
    return forward, backward


def similar(teacher, student, threshold: float, distance=levenshtein) -> dict[tuple[int, int], float]:
    """Normalised distance of every pair of similar tokens, by (teacher id, student id)."""
    pairs = role_pairs(teacher, student)
    forward = exact(teacher, student, pairs)
    backward = exact(student, teacher, [(u, v) for v, u in pairs])
    found = {}
    for v in range(len(teacher.forms)):
        if forward[v] != -1 or teacher.is_special[v]:
            continue
        a = read(teacher.forms[v]).replace(" ", "")
        for u in range(len(student.forms)):
            if backward[u] != -1 or student.is_special[u]:
                continue
            b = read(student.forms[u]).replace(" ", "")
            d = distance(a, b) / (len(a) + len(b)) if a or b else 0.0
            if d < threshold:
                found[v, u] = d
    return found
