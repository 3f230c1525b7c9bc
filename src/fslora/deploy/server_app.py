"""Flower's ServerApp: it carries out one run, with the sites that the grid reaches."""

from __future__ import annotations

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fslora.deploy.flower import FlowerTransport
from fslora.deploy.serve import serve
from fslora.deploy.settings import RunSettings

app = ServerApp()


def main(grid: Grid, context: Context) -> None:
    """Runs every round that is not done yet."""
    serve(RunSettings.of(context.run_config), lambda check, note: FlowerTransport(grid, check, note))


app.main()(main)
