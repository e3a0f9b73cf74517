"""`python -m dpfast.cli`: the command, where its script is not on the path."""

from __future__ import annotations

from dpfast.cli.app import main

main()
