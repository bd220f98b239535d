"""How long building a vocabulary mapper takes, and how much memory, for all three kinds.

    CDM_REAL_DIR=… python -m tests.benchmarks.bench_mapper [--pairs phi-3:qwen2 …] [--kinds em …] [--json FILE]
    python -m tests.benchmarks.bench_mapper --teacher microsoft/Phi-3-mini-4k-instruct --student Qwen/Qwen2-0.5B

Every mapper is built in a process of its own:

    read     seconds to load both tokenizers and read their token forms
    build    seconds to build the mapper, compiling the search included
    cpu      the same in seconds of all cores together: more steady where something else runs as well
    peak     most resident memory of the whole process: interpreter, libraries, tokenizers and all
    beyond   by how much the building raised that peak
    similar  pairs of similar tokens in the mapper
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from tests.benchmarks import PAIRS

KINDS = ("em", "mined", "prefixem")


def measure(teacher: str, student: str, kind: str, threshold: float) -> dict[str, float]:
    """The figures of one mapper. The memory is right in a new process only, since its peak is the process's."""
    # Here and not above: the process that starts this one stays small.
    from transformers import AutoTokenizer

    from get_vocab_mapper.builders import BUILDERS
    from get_vocab_mapper.token_forms import token_forms

    start = time.perf_counter()
    forms = [token_forms(AutoTokenizer.from_pretrained(name)) for name in (teacher, student)]
    read = time.perf_counter() - start
    before, wall, cpu = peak_bytes(), time.perf_counter(), time.process_time()
    mapper = BUILDERS[kind](*forms, threshold=threshold, progress=False)
    return {
        "read": read,
        "build": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "peak": peak_bytes(),
        "beyond": peak_bytes() - before,
        "similar": len(mapper.to_student.indices),
    }


def peak_bytes() -> int:
    """The most memory that the process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure_in_new_process(**arguments) -> dict[str, float]:
    """`measure(**arguments)` in a new process."""
    code = "import json, sys; from tests.benchmarks.bench_mapper import measure; "
    code += "print(json.dumps(measure(**json.loads(sys.argv[1]))))"
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), help="TEACHER:STUDENT, of CDM_REAL_DIR/tokenizers")
    parser.add_argument("--teacher", help="with --student, instead of --pairs: a hub name or an absolute path")
    parser.add_argument("--student", help="with --teacher: likewise")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS, help="of mappers (default: all)")
    parser.add_argument("--simi_threshold", type=float, default=0.3, help="of similar tokens (default: 0.3)")
    parser.add_argument("--json", type=Path, help="write the figures there as well, times in seconds, memory in bytes")
    arguments = parser.parse_args()
    if bool(arguments.teacher) != bool(arguments.student):
        parser.error("give both --teacher and --student, or neither")
    if arguments.teacher:
        pairs = {f"{arguments.teacher}:{arguments.student}": (arguments.teacher, arguments.student)}
    elif "CDM_REAL_DIR" in os.environ:
        folder = Path(os.environ["CDM_REAL_DIR"]).absolute() / "tokenizers"
        pairs = {pair: tuple(str(folder / name) for name in pair.split(":")) for pair in arguments.pairs}
    else:
        parser.error("give --teacher and --student, or set CDM_REAL_DIR to a folder with tokenizers/")

    width = max(map(len, pairs))
    print(f"{'pair':{width}}  kind      read s  build s    cpu s  peak MB  beyond MB     similar")
    results = []
    for pair, (teacher, student) in pairs.items():
        for kind in arguments.kinds:
            threshold = arguments.simi_threshold
            r = measure_in_new_process(teacher=teacher, student=student, kind=kind, threshold=threshold)
            results.append({"pair": pair, "kind": kind, "threshold": threshold, **r})
            print(
                f"{pair:{width}}  {kind:8}  {r['read']:6.2f}  {r['build']:7.2f}  {r['cpu']:7.2f}  "
                f"{r['peak'] / 1e6:7.0f}  {r['beyond'] / 1e6:9.0f}  {r['similar']:10,}",
                flush=True,
            )
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
