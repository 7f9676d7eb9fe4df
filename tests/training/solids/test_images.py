from training.solids.images import SIDE, image_file, prepared
from training.solids.rendering import render
from training.solids.sampling import sample_solids


def test_prepared_images_show_the_object_in_the_middle_on_white() -> None:
    solids = sample_solids([3, 4])
    images = prepared(render(solids, [1, 2], SIDE))
    assert images.shape == (2, 3, SIDE, SIDE)
    shown = images.amin(1) < 0.99
    for rows in (shown.any(2), shown.any(1)):
        first, last = rows.float().argmax(1), SIDE - 1 - rows.flip(1).float().argmax(1)
        assert ((first + last - SIDE + 1).abs() <= 2).all()
    assert image_file(solids[0], 1).startswith(b"\x89PNG")
