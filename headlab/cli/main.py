"""The command line as a whole: its commands from their modules, the demo, and what becomes of errors."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import HeadlabError
from . import results_folder
from .analysis import analysis
from .options import Out
from .pruning import pruning
from .tasks import tasks

app = typer.Typer(
    help="Attention heads of transformers: see what they do, score them, remove them one by one, prune the model, time it.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(pruning)
app.add_typer(analysis)
app.add_typer(tasks, name="tasks")


@app.callback(invoke_without_command=True)
def _help(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def demo(
    out: Out = Path("demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Half the training.")] = False,
    seed: int = 0,
) -> None:
    """Train a probe of plain attention and one of composed heads, compare them on what neither has met, prune the second."""
    from .demo import run

    results_folder.quieten()
    typer.echo(run(out, quick, seed))
    typer.echo(f"Everything is in {out}: begin with {out / 'summary.md'} and {out / 'probes.html'}.")


STOPPED = 130  # exit status after Ctrl-C, by convention 128 + the signal's number


def main() -> None:
    """Run the command line; an error is one line on stderr and exit status 1, never a traceback."""
    try:
        status = app(standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        status = STOPPED
    except HeadlabError as error:
        _fail(str(error), 1)
    except OSError as error:
        _fail(f"{error.filename or 'a file'}: {error.strerror or error}", 1)
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of typer's, whose classes are private
            _fail(f"{error.format_message()} (headlab --help tells more)", 2)
        if "HEADLAB_DEBUG" in os.environ:
            raise
        what = f"{type(error).__name__}: {error}"
        if isinstance(error, MemoryError) or "memory" in str(error):
            _fail(f"out of memory: take fewer or shorter examples (--batch-size, --length); {what}", 1)
        _fail(f"unexpected {what} (HEADLAB_DEBUG=1 shows where)", 1)
    if status == STOPPED:  # which is also how typer reports Ctrl-C
        _fail("stopped; run the same command again to go on", STOPPED)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, status: int) -> None:
    sys.stderr.write(f"headlab: {' '.join(message.split())}\n")
    sys.exit(status)


if __name__ == "__main__":
    main()
