"""A report as data, paragraphs and tables of strings, and its three forms: plain text, Markdown, HTML."""

import html
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from npser.errors import printable

_WIDTH = 100  # columns of the text form


@dataclass(frozen=True)
class Table:
    """A table of strings: the first `left` columns are set flush left, the others flush right."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1


Block = str | Table  # a paragraph, or a table


@dataclass(frozen=True)
class Document:
    heading: str
    blocks: tuple[Block, ...]

    def text(self) -> str:
        """Plain text, at most 100 columns wide as long as the tables are."""
        heading = printable(self.heading)
        parts = [f"{heading}\n{'=' * len(heading)}"]
        for block in self.blocks:
            if isinstance(block, str):
                parts.append(textwrap.fill(printable(block), _WIDTH, break_on_hyphens=False))
            else:
                parts.append(f"{block.title}\n\n{text_table(block)}")
        return "\n\n".join(parts) + "\n"

    def markdown(self) -> str:
        """Markdown with pipe tables."""
        parts = [f"# {_markdown_escaped(self.heading)}"]
        for block in self.blocks:
            if isinstance(block, str):
                parts.append(_markdown_escaped(block))
            else:
                parts.append(f"## {_markdown_escaped(block.title)}\n\n{markdown_table(block)}")
        return "\n\n".join(parts) + "\n"

    def html(self, figures: Sequence[tuple[str, str]] = ()) -> str:
        """One self-contained page; figures: (caption, SVG element), shown behind the first paragraphs."""
        first_table = next((i for i, block in enumerate(self.blocks) if isinstance(block, Table)), len(self.blocks))
        parts = [_html_block(block) for block in self.blocks]
        shown = [f"<figure>{svg}<figcaption>{_html(c)}</figcaption></figure>" for c, svg in figures]
        parts[first_table:first_table] = [f'<div class="figures">{"".join(shown)}</div>'] if shown else []
        body = "\n".join([f"<h1>{_html(self.heading)}</h1>", *parts])
        return _PAGE.format(title=_html(self.heading), body=body)


def text_table(table: Table) -> str:
    """A table as plain text, without its title."""
    header, *rows = ([printable(cell) for cell in row] for row in (table.header, *table.rows))
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if n < table.left else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), "-" * (sum(widths) + 2 * len(widths) - 2), *map(line, rows)])


def markdown_table(table: Table) -> str:
    """A table as a pipe table, without its title."""
    right = len(table.header) - table.left
    ruler = "| " + " | ".join([":--"] * table.left + ["--:"] * right) + " |"
    return "\n".join([_markdown_row(table.header), ruler, *map(_markdown_row, table.rows)])


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(_markdown_escaped, cells)) + " |"


def _markdown_escaped(text: str) -> str:
    """Keep class and folder names from being read as markup."""
    return "".join("\\" + character if character in "\\|_*`<[#" else character for character in printable(text))


def _html(text: str) -> str:
    return html.escape(printable(text))


def _html_block(block: Block) -> str:
    if isinstance(block, str):
        return f"<p>{_html(block)}</p>"

    def row(cells: Sequence[str], tag: str) -> str:
        opening = [f'<{tag} class="left">' if n < block.left else f"<{tag}>" for n in range(len(cells))]
        made = [f"{o}{_html(cell)}</{tag}>" for o, cell in zip(opening, cells, strict=True)]
        return f"<tr>{''.join(made)}</tr>"

    rows = "\n".join(row(cells, "td") for cells in block.rows)
    return (
        f"<h2>{_html(block.title)}</h2>\n<table><thead>{row(block.header, 'th')}</thead>\n<tbody>{rows}</tbody></table>"
    )


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 68rem; margin: 2rem auto;
  padding: 0 1rem; }}
h1 {{ font-size: 1.7rem; }} h2 {{ font-size: 1.15rem; margin: 2.2rem 0 .5rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto; }}
th, td {{ padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }}
th {{ border-bottom: 2px solid #888; }} .left {{ text-align: left; }}
.figures {{ display: flex; flex-wrap: wrap; gap: 1rem; }}
figure {{ margin: 0; flex: 1 1 26rem; }} figure svg {{ width: 100%; height: auto; }}
figcaption {{ color: #555; font-size: .9rem; }}
</style></head><body>
{body}
</body></html>
"""
