"""Pictures of the shapes world: painted cell by cell, and read back by the oracle. Needs nothing but numpy.

Shapes of arrays: B batch.
"""

from typing import NamedTuple

import numpy as np

GRID, CELL = 3, 16  # cells a side, pixels a cell side
SIZE = GRID * CELL
COLORS = {
    "red": (232, 72, 85),
    "yellow": (250, 200, 60),
    "green": (76, 190, 110),
    "blue": (70, 130, 245),
    "purple": (170, 95, 215),
    "white": (238, 240, 245),
}
SHAPES = ("circle", "square", "triangle", "cross")
BACKGROUND = (26, 29, 40)


class Object(NamedTuple):
    color: str
    shape: str
    row: int
    column: int

    @property
    def kind(self) -> tuple[str, str]:
        return self.color, self.shape


KINDS = tuple((color, shape) for color in COLORS for shape in SHAPES)


def _coverage(shape: str, supersampling: int = 8) -> np.ndarray:
    """How much of each pixel of a cell the shape covers: float32 (CELL, CELL), 0 to 1."""
    n = CELL * supersampling
    y, x = (np.mgrid[0:n, 0:n] + 0.5) / supersampling - CELL / 2  # pixels from the cell's centre
    if shape == "circle":
        inside = x**2 + y**2 < 6.0**2
    elif shape == "square":
        inside = (abs(x) < 5.25) & (abs(y) < 5.25)
    elif shape == "triangle":
        inside = (y < 5.25) & (abs(x) < 6.5 * (y + 6.0) / 11.25)
    else:
        inside = ((abs(x) < 1.9) & (abs(y) < 6.0)) | ((abs(y) < 1.9) & (abs(x) < 6.0))
    return inside.reshape(CELL, supersampling, CELL, supersampling).mean((1, 3)).astype(np.float32)


def _cell_pictures() -> np.ndarray:
    """Every cell there is: uint8 (1 + len(KINDS), CELL, CELL, 3), the empty one first, then in the order of KINDS."""
    cells = np.empty((1 + len(KINDS), CELL, CELL, 3), np.float32)
    cells[:] = BACKGROUND
    for i, (color, shape) in enumerate(KINDS, start=1):
        coverage = _coverage(shape)[..., None]
        cells[i] += coverage * (np.array(COLORS[color], np.float32) - cells[i])
    return cells.round().astype(np.uint8)


CELL_PICTURES = _cell_pictures()


def _distances(cells: np.ndarray) -> np.ndarray:
    """Root mean square difference to every cell picture. cells float32 (B, CELL * CELL * 3) -> float32 (B, 1 + kinds)."""
    templates = CELL_PICTURES.reshape(len(CELL_PICTURES), -1).astype(np.float32)
    squares = (cells**2).sum(1)[:, None] + (templates**2).sum(1) - 2 * cells @ templates.T
    return np.sqrt(np.maximum(squares, 0) / templates.shape[1])


def _nearest_pair() -> float:
    distances = _distances(CELL_PICTURES.reshape(len(CELL_PICTURES), -1).astype(np.float32))
    return float(distances[~np.eye(len(distances), dtype=bool)].min())


# The two kinds most alike are 22 apart (of 255). A cell further than three quarters of that from every kind is none of them.
RECOGNISABLE = 0.75 * _nearest_pair()


def render_cells(cells: np.ndarray) -> np.ndarray:
    """Pictures from cell numbers (0 empty, 1 + index into KINDS): (B, 9) -> uint8 (B, SIZE, SIZE, 3)."""
    pictures = CELL_PICTURES[cells].reshape(-1, GRID, GRID, CELL, CELL, 3)
    return pictures.transpose(0, 1, 3, 2, 4, 5).reshape(-1, SIZE, SIZE, 3)


def cells_of(objects: list[Object]) -> np.ndarray:
    """The cell numbers of a scene, row by row: int64 (9,)."""
    cells = np.zeros(GRID * GRID, np.int64)
    for o in objects:
        cells[o.row * GRID + o.column] = 1 + KINDS.index(o.kind)
    return cells


def render(objects: list[Object]) -> np.ndarray:
    """The picture of a scene: uint8 (SIZE, SIZE, 3)."""
    return render_cells(cells_of(objects)[None])[0]


def parse(pictures: np.ndarray) -> list[list[Object] | None]:
    """The oracle: what is in each picture, objects row by row, or None where a cell is unrecognisable.

    pictures: uint8 (B, SIZE, SIZE, 3).
    """
    if pictures.ndim != 4 or pictures.shape[1:] != (SIZE, SIZE, 3) or pictures.dtype != np.uint8:
        raise ValueError(f"expected uint8 pictures (B, {SIZE}, {SIZE}, 3), got {pictures.dtype} {pictures.shape}")
    cells = pictures.reshape(-1, GRID, CELL, GRID, CELL, 3).transpose(0, 1, 3, 2, 4, 5)
    distances = _distances(cells.reshape(-1, CELL * CELL * 3).astype(np.float32))
    nearest = distances.argmin(1).reshape(-1, GRID * GRID)
    recognised = (distances.min(1) < RECOGNISABLE).reshape(-1, GRID * GRID).all(1)
    return [
        [Object(*KINDS[kind - 1], i // GRID, i % GRID) for i, kind in enumerate(kinds) if kind > 0] if ok else None
        for kinds, ok in zip(nearest.tolist(), recognised)
    ]
