import pytest
import torch

from training.solids.sampling import LONGEST_HALF_SIDE, sample_solids, training_solids
from training.solids.solids import COMBINATIONS, HELD_OUT, KINDS, Solid, SolidBatch


@pytest.fixture(scope="module")
def many_solids() -> list[Solid]:
    return training_solids(0, 1500)


def test_solid_depends_on_its_seed_alone() -> None:
    (solid,) = sample_solids([33])
    assert sample_solids(range(30, 40))[3] == solid
    assert training_solids(30, 10)[3] == solid
    assert sample_solids([34]) != [solid]
    assert sample_solids([33], held_out=True) != [solid]


@pytest.mark.parametrize("held_out", [False, True])
def test_bounding_box_of_a_solid_is_centred_and_has_the_documented_size(held_out: bool) -> None:
    """Measured by surface points: with this many, some are near the outermost ones."""
    points, _ = SolidBatch(sample_solids(range(24), held_out=held_out)).surface_points(
        12_000, torch.Generator().manual_seed(0)
    )
    low, high = points.amin(1), points.amax(1)
    torch.testing.assert_close((low + high) / 2, torch.zeros(24, 3), atol=0.02, rtol=0)
    torch.testing.assert_close(((high - low) / 2).amax(1), torch.full((24,), LONGEST_HALF_SIDE), atol=0.02, rtol=0)


def test_training_has_all_combinations_but_the_held_out_ones(many_solids: list[Solid]) -> None:
    assert not any(solid.is_held_out for solid in many_solids)
    shown = {(solid.operation, tuple(part.kind for part in solid.parts)) for solid in many_solids}
    allowed = {(operation, pair) for operation, pairs in COMBINATIONS.items() for pair in pairs}
    assert shown == {(None, (kind,)) for kind in KINDS} | {
        (operation, pair) for operation, pair in allowed if pair not in HELD_OUT[operation]
    }


def test_held_out_solids_have_all_held_out_combinations_and_no_others() -> None:
    solids = sample_solids(range(200), held_out=True)
    assert all(solid.is_held_out for solid in solids)
    assert {(solid.operation, tuple(part.kind for part in solid.parts)) for solid in solids} == {
        (operation, pair) for operation, pairs in HELD_OUT.items() for pair in pairs
    }


def test_operations_have_the_documented_shares(many_solids: list[Solid]) -> None:
    for operation, share in ((None, 0.40), ("union", 0.35), ("cut", 0.25)):
        count = sum(solid.operation == operation for solid in many_solids)
        assert count / 1500 == pytest.approx(share, abs=0.05)


def test_cut_removes_a_visible_share_and_leaves_more() -> None:
    solids = [*sample_solids(range(20)), *sample_solids(range(20), held_out=True)]
    cuts = [solid for solid in solids if solid.operation == "cut"]
    assert len(cuts) >= 10
    points = (2.4 * torch.rand(20_000, 3, generator=torch.Generator().manual_seed(0)) - 1.2).expand(len(cuts), -1, -1)
    uncut = SolidBatch([Solid(solid.parts[:1], None) for solid in cuts]).signed_distance(points) > 0
    left = SolidBatch(cuts).signed_distance(points) > 0
    removed = 1 - left.sum(1) / uncut.sum(1)
    assert removed.min() > 0.03
    assert removed.max() < 0.55
