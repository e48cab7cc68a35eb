"""Tables of the papers that frugax answers to."""

from frugax.papers import families, papers

from ..markdown import table


def family_rows() -> str:
    """Tabulate the families of papers: one row each, with its methods."""
    rows = []
    for name, about in families().items():
        anchor = name.replace("_", "-")
        methods = ", ".join(f"`{paper.slug}`" for paper in papers() if paper.family == name)
        rows.append([f"[{name.replace('_', ' ')}](docs/papers.md#{anchor})", about, methods])
    return table(["family", "what it holds", "papers"], rows)


def every_paper() -> str:
    """Tabulate lib/papers/, a section for each family."""
    sections = []
    for family, about in families().items():
        rows = []
        for paper in (paper for paper in papers() if paper.family == family):
            title = f"[{paper.title}](https://arxiv.org/abs/{paper.arxiv})"
            symbols = ", ".join(f"`{symbol.removeprefix('frugax.')}`" for symbol in paper.symbols)
            rows.append([f"`{paper.slug}`", f"{title}, {paper.year}", symbols, paper.left_out, paper.note])
        head = ["", "paper", "in `frugax`", "left out", "what differs"]
        sections.append(
            f"## {family.replace('_', ' ').capitalize()}\n\nHolds {about}.\n\n{table(head, rows)}"
        )
    return "\n\n".join(sections)
