"""How much work and memory the decoding of a mesh is expected to take, by its octree resolution. No torch.

The figures are of solids that fill most of the cube: `benchmarks.field` prints the points and faces of real shapes.
"""

MIN_COARSE_CELLS = 64
"""Least number of cells a side of the coarsest level. Its points are 1.6 % of a grid of 256."""

MIN_POINTS_PER_CALL = 2048
"""Points at which the field is read at once on a CPU, whose caches hold no more, and at least on any device."""

_POINTS_NEAR_SURFACE = 6
"""Points that are evaluated near the surface, per square of a level's cells a side: 5.9 were counted at 256 and 512."""

_FACES = 4.2
"""Triangles of the surface, per square of the cells a side."""

_GRID_BYTES = 6
"""Bytes a point while a grid is decoded: its float32, an eighth of that for the coarser grid, and marks of points."""

_PROCESS_BYTES = 400_000_000
_SURFACE_BYTES, _FACE_BYTES = 12, 1500
"""Bytes of the process that extracts, cleans up and encodes a surface: its imports, and bytes a grid point and a face.

A ball of 512 cells a side takes 1.5 GB. The rest leaves room for surfaces with three times as many faces.
"""


def coarsest_stride(octree_resolution: int) -> int:
    """The stride of the coarsest level, a power of 2; 1 if half of the resolution is less than `MIN_COARSE_CELLS`."""
    stride = 1
    while num_cells(octree_resolution, 2 * stride) >= MIN_COARSE_CELLS:
        stride *= 2
    return stride


def num_cells(octree_resolution: int, stride: int) -> int:
    """Cells a side of a level. The last one is smaller where the stride does not divide the resolution."""
    return -(-octree_resolution // stride)


def num_grid_points(octree_resolution: int) -> int:
    return int((octree_resolution + 1) ** 3)


def num_field_points(octree_resolution: int) -> int:
    """Points at which the field is evaluated, over all levels."""
    stride = coarsest_stride(octree_resolution)
    num_points = num_grid_points(num_cells(octree_resolution, stride))
    while stride > 1:
        stride //= 2
        num_points += _POINTS_NEAR_SURFACE * num_cells(octree_resolution, stride) ** 2
    return num_points


def num_faces(octree_resolution: int) -> int:
    return round(_FACES * octree_resolution**2)


def grid_bytes(octree_resolution: int) -> int:
    """Bytes on the device while the field is decoded."""
    return _GRID_BYTES * num_grid_points(octree_resolution)


def surface_bytes(octree_resolution: int) -> int:
    """Bytes of the process that makes a file of a surface."""
    return (
        _PROCESS_BYTES
        + _SURFACE_BYTES * num_grid_points(octree_resolution)
        + _FACE_BYTES * num_faces(octree_resolution)
    )
