import torch

from training.solids.parts import describe
from training.solids.sampling import LONGEST_HALF_SIDE, sample_solids
from training.solids.solids import KINDS, Part, Solid, SolidBatch

SOLIDS = sample_solids(range(40))


def test_ends_of_the_longest_axis_lie_on_the_surface() -> None:
    """The matrix has the half sides as eigenvalues and the axes as eigenvectors."""
    kinds, vectors = describe(SOLIDS)
    lengths, axes = torch.linalg.eigh(vectors[:, :, 1:4])
    ends = vectors[:, :, 0] + lengths[..., -1:] * axes[..., -1]
    first, second = SolidBatch(SOLIDS).part_distances(ends.flatten(0, 1).expand(len(SOLIDS), -1, -1))
    distances = torch.stack((first.unflatten(1, (-1, 2)), second.unflatten(1, (-1, 2))), -1)
    for row, solid in enumerate(SOLIDS):
        for slot, part in enumerate(solid.parts):
            assert kinds[row, slot] % len(KINDS) == KINDS.index(part.kind)
            if part.kind != "cone":  # which is slimmer where its middle is
                assert abs(distances[row, row, slot, slot]) < 1e-4


def test_cut_away_parts_have_their_own_kinds_and_missing_parts_zeros() -> None:
    kinds, vectors = describe(SOLIDS)
    for row, solid in enumerate(SOLIDS):
        assert (kinds[row] >= len(KINDS)).tolist() == [False, solid.operation == "cut"]
        assert bool(vectors[row, 1].any()) == (len(solid.parts) == 2)
        assert vectors[row].abs().max() < 3 * LONGEST_HALF_SIDE


def test_tip_vector_of_a_cone_ends_at_its_tip() -> None:
    cones = [solid for solid in SOLIDS if solid.parts[0].kind == "cone"]
    _, vectors = describe(cones)
    tips = vectors[:, 0, 0] + vectors[:, 0, 4]
    first, _ = SolidBatch(cones).part_distances(tips[:, None])
    assert len(cones) > 2
    assert first.abs().max() < 1e-5
    others = [solid for solid in SOLIDS if solid.parts[0].kind != "cone"]
    assert not describe(others).vectors[:, 0, 4].any()


def test_quarter_turns_that_swap_sides_of_a_box_do_not_change_its_description() -> None:
    upright = Part("box", (0.3, 0.5, 0.9), ((1, 0, 0), (0, 1, 0), (0, 0, 1)), (0.1, 0, 0))
    lying = Part("box", (0.5, 0.3, 0.9), ((0, -1, 0), (1, 0, 0), (0, 0, 1)), (0.1, 0, 0))
    _, vectors = describe([Solid((upright,), None), Solid((lying,), None)])
    torch.testing.assert_close(vectors[0], vectors[1])
