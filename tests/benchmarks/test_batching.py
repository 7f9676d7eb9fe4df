from pathlib import Path

from benchmarks.batching import Load, measure
from models.zoo import load_engine


def test_row_has_ratios_of_the_kinds_in_the_load() -> None:
    engine = load_engine([Path("checkpoints/tiny-flux")], device="cpu", router_weights=Path("router_weights"))
    row = measure(engine, "tiny-flux", 64, Load(0, 2), num_rounds=1)
    assert (row["side"], row["dense"], row["light"], row["dense_ratio"]) == (64, 0, 2, None)
    for ratio in ("light_ratio", "all_ratio"):
        value = row[ratio]
        assert isinstance(value, float)
        assert 0.1 < value < 10
