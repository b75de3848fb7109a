"""Markdown that grows while a model writes it, as lines for a terminal, by rich.

The text is divided into blocks: paragraphs, lists, tables, code. A block is final when the next one has begun; only the
last one is rendered again for new text. Nothing of the text is interpreted but Markdown: HTML is shown as it is
written, and links show their address instead of hiding it in an escape sequence.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from markdown_it import MarkdownIt
from markdown_it.rules_core import StateCore
from markdown_it.token import Token
from rich import markdown as rich_markdown
from rich.color import ColorSystem
from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.style import Style
from rich.syntax import ANSISyntaxTheme, Syntax
from rich.table import Table
from rich.text import Text
from rich.theme import Theme

from .live_region import StyledLine
from .printable import printable

# Colours that can be read on a light and on a dark ground.
THEME = Theme(
    {
        "markdown.code": Style(color="cyan"),
        "markdown.h1": Style(bold=True, underline=True),
        "markdown.h2": Style(bold=True, underline=True),
        "markdown.h3": Style(bold=True),
        "markdown.h4": Style(bold=True, italic=True),
        "markdown.h7": Style(italic=True),
        "markdown.link": Style(underline=True),
        "markdown.link_url": Style(color="cyan"),
        "markdown.hr": Style(dim=True),
        "markdown.block_quote": Style(italic=True),
        "markdown.item.bullet": Style(bold=True),
        "markdown.item.number": Style(bold=True),
        "markdown.table.border": Style(dim=True),
        "markdown.table.header": Style(bold=True),
    }
)
CODE_THEME = ANSISyntaxTheme(
    {
        ("Comment",): Style(dim=True, italic=True),
        ("Keyword",): Style(color="magenta"),
        ("Operator", "Word"): Style(color="magenta"),
        ("Name", "Function"): Style(bold=True),
        ("Name", "Class"): Style(bold=True),
        ("Name", "Builtin"): Style(color="cyan"),
        ("Name", "Decorator"): Style(color="cyan"),
        ("Name", "Tag"): Style(color="magenta"),
        ("Literal", "String"): Style(color="green"),
        ("Literal", "Number"): Style(color="cyan"),
        ("Generic", "Deleted"): Style(color="red"),
        ("Generic", "Inserted"): Style(color="green"),
    }
)


# Markdown drops the spaces that begin a line inside a paragraph. A model may mean them: code without a fence, poems.
INDENT = "\ue000"  # stands for such a space while the text is rendered; models have no use for this character
INDENTED = re.compile(r"(?<=\n)[ \t]+")


class MarkdownStream:
    """The lines of a growing Markdown text."""

    def __init__(self) -> None:
        self._parser = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
        self._parser.core.ruler.before("inline", "indent", _keep_indents)
        self._definitions: dict[str, object] = {}  # of links, in earlier blocks
        self._console = Console(force_terminal=True, theme=THEME, highlight=False, markup=False, emoji=False)
        self._rest = ""  # the text of the blocks that are not final
        self._began = False  # whether a block was final before
        self._given = 0  # number of the running block's lines that are final

    def resume(self, text: str) -> None:
        """Begins with the running block of an earlier text, whose other blocks were shown before."""
        self._rest = text = printable(text)
        blocks = self._blocks()
        self._rest = "".join(text.splitlines(keepends=True)[blocks[-1][0].map[0] :]) if blocks else ""  # type: ignore[index]

    def add(self, text: str) -> None:
        self._rest += printable(text)  # before rich drops some control characters

    def lines(self, width: int, ended: bool = False) -> tuple[list[StyledLine], list[StyledLine]]:
        """(lines that have become final since the last call, lines that may still change).

        width: of the terminal, in columns. ended: whether the text is complete; then all lines are final.
        """
        blocks = self._blocks()
        whole_lines = self._rest.count("\n")
        count = len(blocks)  # of the blocks that are final
        if not ended and blocks:
            count -= 1
            # An unfinished line may turn out to belong to the block before it.
            if count and _start(blocks[-1]) >= whole_lines:
                count -= 1
        final: list[StyledLine] = []
        for block in blocks[:count]:
            final += self._lines_of(block, width)
            self._began, self._given = True, 0
        live: list[StyledLine] = []
        running, began = blocks[count:], self._began
        for block in running:
            lines = self._lines_of(block, width)
            opened = block[0].type == "fence" and _start(block) < whole_lines
            if opened and len(running) == 1:
                # The earlier lines of code do not change. The last two are the newest line and the closing fence.
                final += lines[:-2]
                self._given += len(lines[:-2])
                lines = lines[-2:]
            live += lines
            self._began = True
        self._began = began
        if count and running:
            self._rest = "".join(self._rest.splitlines(keepends=True)[_start(running[0]) :])
        elif ended:
            self._rest = ""
        return final, live

    def _blocks(self) -> list[list[Token]]:
        """The tokens of each block at the top."""
        blocks: list[list[Token]] = []
        depth = 0
        for token in self._parser.parse(self._rest, self._definitions):
            if depth == 0:
                blocks.append([])
            blocks[-1].append(token)
            depth += token.nesting
            if token.children:
                token.children = list(_in_lines(token.children))
        return blocks

    def _lines_of(self, block: list[Token], width: int) -> list[StyledLine]:
        """The lines of a block that were not given as final, after an empty one if it is not the first block."""
        self._console.width = width
        segments = list(self._console.render(_MarkdownBlock(block)))
        lines = [_styled(line) for line in Segment.split_lines(segments)]
        while lines and not lines[-1].columns:
            del lines[-1]
        while lines and not lines[0].columns:
            del lines[0]
        before = [StyledLine("", 0)] if self._began else []
        return (before + lines)[self._given :]


class _CodeLines(rich_markdown.CodeBlock):
    """Code between the fences that it was written in. At the top it is not broken into lines, so it can be copied."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code = self.text.plain.removesuffix("\n")
        language = "" if self.lexer_name == "text" else self.lexer_name
        syntax = Syntax(code, self.lexer_name, theme=CODE_THEME, word_wrap=True)
        yield Text(f"```{language}", style="dim")
        if options.max_width < console.width:
            yield syntax
        else:
            lines = syntax.highlight(code).split("\n", allow_blank=True)
            for line in lines[: code.count("\n") + 1]:
                line.expand_tabs(8)
                yield from line.render(console, end="\n")
        yield Text("```", style="dim")


class _IndentedCode(_CodeLines):
    """Code that was written without fences, as it was written: with four spaces before each line."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self.text.plain.removesuffix("\n").split("\n"):
            yield Text(f"    {line}", style=THEME.styles["markdown.code"])


class _FoldedTable(rich_markdown.TableElement):
    """A table that breaks words which are too long for a column, instead of cutting them."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for part in super().__rich_console__(console, options):
            if isinstance(part, Table):
                for column in part.columns:
                    column.overflow = "fold"
            yield part


class _LeftHeading(rich_markdown.Heading):
    LEVEL_ALIGN = dict.fromkeys(rich_markdown.Heading.LEVEL_ALIGN, "left")  # type: ignore[arg-type]


class _MarkdownBlock(rich_markdown.Markdown):
    """A block of Markdown that has been parsed."""

    elements = {  # noqa: RUF012  # rich's own annotation is a ClassVar
        **rich_markdown.Markdown.elements,
        "fence": _CodeLines,
        "code_block": _IndentedCode,
        "table_open": _FoldedTable,
        "heading_open": _LeftHeading,
    }

    def __init__(self, tokens: list[Token]) -> None:
        super().__init__("", hyperlinks=False)
        self.parsed = tokens


def _start(block: list[Token]) -> int:
    """The index of the block's first line."""
    lines = block[0].map
    assert lines is not None
    return lines[0]


def _keep_indents(state: StateCore) -> None:
    for token in state.tokens:
        if token.type == "inline":
            token.content = INDENTED.sub(lambda found: INDENT * len(found[0].expandtabs(4)), token.content)


def _in_lines(tokens: Sequence[Token]) -> Iterator[Token]:
    """A paragraph's tokens, with line breaks where it was written in lines.

    A link whose text is its address becomes plain text, and so does an image, which cannot be shown.
    """
    bare: set[int] = set()  # the beginnings and ends of links whose text is their address
    for place, token in enumerate(tokens):
        if token.type == "softbreak":
            token.type = "hardbreak"
        elif token.type == "image":
            token = Token("text", "", 0, content=f"![{token.content}]({token.attrs.get('src')})")
        after = [(each.type, each.content) for each in tokens[place + 1 : place + 3]]
        if token.type == "link_open" and after == [("text", token.attrs.get("href")), ("link_close", "")]:
            bare.update((place, place + 2))
        if place not in bare:
            yield token


def _styled(line: Sequence[Segment]) -> StyledLine:
    """A line as text with escape sequences: colours and weights, and nothing else, whatever the text is."""
    pieces = [
        (printable(text).replace("\t", " ").replace(INDENT, " "), style) for text, style, control in line if not control
    ]
    while pieces and not pieces[-1][0].strip():
        del pieces[-1]
    if pieces:
        pieces[-1] = (pieces[-1][0].rstrip(), pieces[-1][1])
    columns = sum(Segment(text).cell_length for text, _ in pieces)
    written = (
        style.update_link(None).render(text, color_system=ColorSystem.STANDARD) if style else text
        for text, style in pieces
    )
    return StyledLine("".join(written), columns)
