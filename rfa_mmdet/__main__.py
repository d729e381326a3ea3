"""Run a tool from any folder: python -m rfa_mmdet TOOL [arguments]. Without TOOL, list all."""

import sys
from difflib import get_close_matches

from rfa_mmdet.cli import find_tools, run_tool
from rfa_mmdet.version import __version__

USAGE = "usage: python -m rfa_mmdet TOOL [arguments]      (TOOL --help lists its arguments)"


def main() -> int | str | None:
    """Run the command line and return the exit status."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    tools = find_tools()
    if name in ("-h", "--help"):
        width = max(map(len, tools))
        print(USAGE, "", *(f"  {tool:<{width}}  {tools[tool]}" for tool in tools), sep="\n")
        return 0
    if name == "--version":
        print(f"rfa_mmdet {__version__}")
        return 0
    if name not in tools:
        near = get_close_matches(name, tools, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else f"choose from {', '.join(tools)}"
        print(f"error: unknown tool {name!r}; {hint}", file=sys.stderr)
        return 2
    # argparse prints argv[0] as the program's name.
    sys.argv = [f"python -m rfa_mmdet {name}", *sys.argv[2:]]
    return run_tool(name)


if __name__ == "__main__":
    sys.exit(main())
