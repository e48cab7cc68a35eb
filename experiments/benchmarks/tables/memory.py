"""Tables of docs/how-to/memory.md."""

from frugax.memory import POLICIES

from ..markdown import read, table


def policies() -> str:
    """Tabulate the policies of rematerialization and what each keeps."""
    return table(["`memory.remat`", "a layer keeps"], [[f'"{n}"', p.keeps] for n, p in POLICIES.items()])


def memory() -> str:
    """Tabulate temporaries on the device and bytes on the host, by way and chip."""
    result, names = read("memory"), {"v5e": "v5e", "h200": "H200"}
    rows = [
        [f"`{way}`", *(f"{on[chip][key] / 1e6:,.0f}" for chip in names for key in ("temporaries", "host"))]
        for way, on in result["rows"].items()
    ]
    head = [
        "`memory.remat`, and others",
        *(f"{name}{of}" for name in names.values() for of in (", MB", ", host MB")),
    ]
    return f"{result['model']}. jax {result['jax']}, {result['date']}.\n\n{table(head, rows)}"
