import pytest


@pytest.fixture
def small_chunks(monkeypatch):
    """Whole logits are gone through three rows at a time."""
    from modeling.losses import logits

    monkeypatch.setattr(logits, "CPU_ROWS", 3)


@pytest.fixture(scope="session")
def pair():
    from tests.unit.helpers import Pair

    return Pair()
