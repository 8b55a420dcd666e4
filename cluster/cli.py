"""The verbs of chartlm, and how their errors reach the user.

The upper floors are known here as strings only, and nothing beyond the standard library is imported before a verb
runs, so that help and a mistyped verb need no installation.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import sys
from dataclasses import dataclass
from typing import NoReturn

from cluster.errors import ChartlmError
from cluster.token import unseal, use_token


@dataclass(frozen=True)
class Verb:
    """One line of help, and where the verb is implemented (None: in launch.sh itself)."""

    usage: str
    summary: str
    module: str | None = None
    function: str = "main"
    recipe: str = ""  # where the verb can be a job: the recipe's class in that module, or what gives it for the words


VERBS = {
    "demo": Verb("demo [FOLDER] [key=value…]", "the whole story on a synthetic hospital, in minutes", "cluster.story"),
    "hospital": Verb(
        "hospital out=DIR patients=400",
        "write a synthetic hospital in MIMIC-III's format",
        "sharding.synthetic",
        recipe="HospitalRecipe",
    ),
    "shard": Verb(
        "shard RECIPE input=FILE", "notes → cleaned, tokenized Arrow shards", "sharding.job", recipe="ShardRecipe"
    ),
    "check": Verb("check NOTEEVENTS.csv.gz", "compare a file with the counts of MIMIC-III v1.4", "sharding.check"),
    "verify": Verb("verify SHARDS", "find every damaged or foreign file of a corpus", "sharding.verify"),
    "stats": Verb("stats SHARDS", "what a corpus is made of, as tables and stats.png", "sharding.stats"),
    "pretrain": Verb(
        "pretrain RECIPE", "train a language model on shards; again = resume", "pretrain.train", recipe="TrainRecipe"
    ),
    "find-lr": Verb("find-lr RECIPE", "suggest a learning rate, as a number and a picture", "pretrain.find_lr"),
    "evaluate": Verb(
        "evaluate RUN [RUN…] [split=test]",
        "perplexity, bits per byte; several runs as one mixture",
        "pretrain.evaluate",
    ),
    "compare": Verb("compare RUN RUN…", "runs of any vocabulary side by side, in bits per byte", "pretrain.compare"),
    "generate": Verb('generate RUN prompt="blood loss"', "text from a trained model", "pretrain.generate"),
    "plot": Verb("plot RUN [RUN…]", "the curves of one or several runs as a picture", "pretrain.plot"),
    "finetune": Verb(
        "finetune RECIPE [run=RUN]",
        "train and evaluate a clinical predictor",
        "downstream.finetune",
        recipe="recipe_of",
    ),
    "predict": Verb("predict OUT NOTES.csv", "a fine-tuned predictor on new notes, streamed", "downstream.predict"),
    "explain": Verb("explain OUT NOTE.txt", "where that predictor looks in a note, as a page", "downstream.explain"),
    "annotate": Verb(
        "annotate rules NOTES.csv concepts=FILE",
        "mentions of concepts in notes and what is said of them",
        "downstream.concepts.annotate",
    ),
    "view": Verb("view ANNOTATED.jsonl", "annotated notes as an HTML page", "downstream.concepts.view"),
    "score": Verb(
        "score GOLD.jsonl PREDICTED.jsonl", "annotations against a hand-labelled set", "downstream.concepts.score"
    ),
    "up": Verb("up [workers=N]", "a Ray cluster on this machine; join=HOST:PORT joins one", "cluster.local", "up"),
    "down": Verb("down", "end what up has started here", "cluster.local", "down"),
    "submit": Verb("submit VERB RECIPE [cluster=URL]", "run a verb as a job of a cluster", "cluster.jobs", "submit"),
    "status": Verb("status [JOB]", "the jobs of a cluster and where they stand", "cluster.jobs", "status"),
    "logs": Verb("logs JOB [-f] [rank=N]", "what a job printed, and one worker of it", "cluster.jobs", "logs"),
    "stop": Verb("stop JOB", "end a job when it has saved; submit it again to go on", "cluster.jobs", "stop"),
    "resume": Verb("resume RUN_DIR", "submit the pretraining of a run directory again", "cluster.jobs", "resume"),
    "test": Verb("test [slow] [pytest arguments]", "lint, unit and integration tests; slow: the long proofs"),
    "lint": Verb("lint", "ruff, mypy, shellcheck"),
}


def help_text() -> str:
    """The verbs, one line each."""
    width = max(len(verb.usage) for verb in VERBS.values())
    lines = [f"  ./launch.sh {verb.usage:<{width}}  {verb.summary}" for verb in VERBS.values()]
    return "\n".join(["chartlm: language models from clinical notes", "", *lines])


def settle_threads() -> None:
    """How threads wait, for a process that has not imported torch yet.

    Threads that spin make a step a hundred times slower (measured) when another process has the core. Threads that do
    not spin at all take a third longer for an LSTM on two cores: they wait for each other thousands of times a step. A
    thousand turns are some microseconds, and cost a fifth where the cores are another's.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def run_verb(name: str, args: list[str]) -> None:
    """Runs a verb. A user's mistake ends the process with one line on stderr and a code that is not 0."""
    verb = VERBS.get(name)
    if verb is None or verb.module is None:
        close = difflib.get_close_matches(name, VERBS, 1, 0.5)
        advice = f"the nearest is {close[0]!r}" if close else f"the verbs are {', '.join(VERBS)}"
        _fail(f"no verb {name!r}; {advice}", 2)
    settle_threads()
    # Where free memory is in pieces, the kernel first makes room for the huge pages that numpy asks for: a third of the
    # time of a survey of 3.5 million notes (measured). Work on one block after the other sees no difference.
    os.environ.setdefault("NUMPY_MADVISE_HUGEPAGE", "0")
    try:
        getattr(importlib.import_module(verb.module), verb.function)(args)
    except ChartlmError as exc:
        _fail(str(exc), exc.exit_code)
    except KeyboardInterrupt:
        _fail(f"{name}: interrupted; the same command goes on from where it stands", 130)
    except BrokenPipeError:
        sys.exit(141)
    except OSError as exc:
        if exc.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _fail(f"{exc.filename or name}: no space left; free some and run the same command again", 2)


def _fail(line: str, code: int) -> NoReturn:
    sys.stderr.write(f"chartlm: {' '.join(line.split())}\n")
    sys.exit(code)


def main() -> None:
    """`python -m cluster.cli VERB …`."""
    use_token()  # before Ray is imported: it looks once
    unseal()
    if len(sys.argv) < 2 or sys.argv[1] in ("help", "-h", "--help"):
        sys.stdout.write(help_text() + "\n")
        return
    run_verb(sys.argv[1], sys.argv[2:])


if __name__ == "__main__":
    main()
