"""Picture of what the reward model sees: an incorrect and a correct response, coloured by token weight and by score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from oreal_megatron.observe.dumped_samples import WeighedResponse, choose_pair, newest_responses

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 96  # most characters of a line
FEWEST_COLUMNS = 64  # for the titles
MOST_TOKENS = 600  # of a response that are drawn
FONT_SIZE = 9.0  # points
ADVANCE = 0.602  # width of a character of DejaVu Sans Mono, in font sizes
LINE_HEIGHT = 1.9  # in font sizes
TITLE_INCHES = 0.4
NEWLINE = "⏎"


@dataclass(frozen=True)
class TokenBox:
    """Text of a token, or of its part on one line, and where it is drawn."""

    text: str
    line: int
    column: int
    value: float  # of the token


@dataclass(frozen=True)
class Block:
    """One response coloured by one kind of value."""

    title: str
    boxes: list[TokenBox]
    colours: str  # matplotlib's name of the colour map
    limits: tuple[float, float]  # values of its ends

    @property
    def lines(self) -> int:
        """Lines of text."""
        return max((box.line for box in self.boxes), default=0) + 1

    @property
    def columns(self) -> int:
        """Characters of its longest line."""
        return max((box.column + len(box.text) for box in self.boxes), default=0)


def draw(run: Path, path: Path, decode: Callable[[int], str]) -> str:
    """Draw a pair of responses of the newest dump with scores; return their names. `decode` spells a token."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    step, responses = newest_responses(run)
    pair = choose_pair(responses)
    blocks = blocks_of(pair, decode)
    columns = max(FEWEST_COLUMNS, *(block.columns for block in blocks))
    heights = [block.lines * LINE_HEIGHT * FONT_SIZE / 72 for block in blocks]
    figure, all_axes = plt.subplots(
        len(blocks), 1, figsize=(columns * ADVANCE * FONT_SIZE / 72, sum(heights) + TITLE_INCHES * (len(blocks) + 1.3)),
        height_ratios=heights, layout="constrained",
    )  # fmt: skip
    names = ", ".join(f"{'correct' if response.correct else 'incorrect'} rollout {response.index}" for response in pair)
    description = f"step {step}, prompt {pair[0].slot} of the step: {names}"
    title = f"{str(run)[-FEWEST_COLUMNS:]}\n{description}"
    figure.suptitle(title, fontsize=FONT_SIZE, x=0.01, ha="left", parse_math=False)
    for axes, block in zip(all_axes, blocks, strict=True):
        _draw_block(axes, block, columns)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return description


def blocks_of(pair: Sequence[WeighedResponse], decode: Callable[[int], str]) -> list[Block]:
    """Return each response twice: by weight and by score, each with one scale for both responses."""
    largest = max(abs(score) for response in pair for score in response.scores) or 1.0
    heaviest = max(weight for response in pair for weight in response.weights) or 1.0
    blocks = []
    for response in pair:
        side, colours = ("correct", "Greens") if response.correct else ("incorrect", "Reds")
        hidden = len(response.tokens) - MOST_TOKENS
        more = f"; {hidden} further tokens are not drawn" if hidden > 0 else ""
        texts = [decode(token) for token in response.tokens[:MOST_TOKENS]]
        weight_title = (
            f"{side} rollout: weight in the loss, 0 white to {heaviest:.2g} {colours.removesuffix('s').lower()}{more}"
        )
        score_title = f"{side} rollout: score, {-largest:.2g} red (wrong) to {largest:.2g} green (right){more}"
        blocks.append(Block(weight_title, place_tokens(texts, response.weights), colours, (0.0, heaviest)))
        blocks.append(Block(score_title, place_tokens(texts, response.scores), "RdYlGn", (-largest, largest)))
    return blocks


def place_tokens(texts: Sequence[str], values: Sequence[float]) -> list[TokenBox]:
    """Return boxes of the tokens on lines of COLUMNS characters; a newline in a token is shown and breaks the line."""
    boxes: list[TokenBox] = []
    line = column = 0
    for text, value in zip(texts, values, strict=False):
        for text_line in text.replace("\n", NEWLINE + "\n").splitlines() or [" "]:
            if column and column + len(text_line) > COLUMNS:
                line, column = line + 1, 0
            for start in range(0, len(text_line), COLUMNS):
                if column == COLUMNS:
                    line, column = line + 1, 0
                part = text_line[start : start + COLUMNS]
                boxes.append(TokenBox(part, line, column, value))
                column += len(part)
                if part.endswith(NEWLINE):
                    line, column = line + 1, 0
    return boxes


def _draw_block(axes: Axes, block: Block, columns: int) -> None:
    import matplotlib
    from matplotlib.patches import Rectangle

    axes.set(xlim=(0, columns), ylim=(block.lines, 0))
    axes.axis("off")
    axes.set_title(block.title, fontsize=FONT_SIZE, loc="left")
    colours, (low, high) = matplotlib.colormaps[block.colours], block.limits
    for box in block.boxes:
        colour = colours((box.value - low) / (high - low))
        axes.add_patch(Rectangle((box.column, box.line), len(box.text), 0.9, color=colour, linewidth=0))
        dark = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] < 0.45
        for number, character in enumerate(box.text):  # alone, so that each stands in its column
            axes.text(
                box.column + number + 0.5, box.line + 0.47, character, fontsize=FONT_SIZE, family="DejaVu Sans Mono",
                ha="center", va="center", color="white" if dark else "black", parse_math=False,
            )  # fmt: skip
