"""Send a study that has been searched to another MLflow: its trials, stages, references and summary."""

from __future__ import annotations

import argparse

from ktray.cli.terminal import print_result, settings_of

HELP = "send a finished study to another MLflow"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this verb."""
    parser.add_argument("name", metavar="NAME", help="the study")
    parser.add_argument("tracker", metavar="TRACKER", help="such as https://mlflow.example.org or sqlite:////data/mlflow.db")
    parser.add_argument("--share-images", action="store_true", help="send contact sheets of your images to a server, too")


def run(args: argparse.Namespace) -> int:
    """Do it; the exit code, 1 if the tracker has not got everything.

    Raises:
        UserError: there is no such study, it is being searched, or no tracker has this URI.
    """
    from ktray.redaction import remember, without_secrets
    from ktray.runs.study_sync import sync
    from ktray.text import counted

    remember(args.tracker)
    sent = sync(args.name, args.tracker, settings_of(args), args.share_images)
    missing = vars(sent.missing)
    place = without_secrets(args.tracker)
    text = f"sent {counted(sent.trials, 'trial')} and {counted(sent.stages, 'stage')} to {place}"
    if any(missing.values()):
        text = f"{place} has not got {counted(sum(missing.values()), 'event')} yet; the same command goes on"
    print_result(args, {"trials": sent.trials, "stages": sent.stages, **missing}, text)
    return 1 if any(missing.values()) else 0
