"""What the documents print is true: commands parse, keys exist, recipes load, links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest
import typer

from fslora import config
from fslora.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "configs").glob("*.toml"))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)


def commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for block in [*blocks(page, "sh"), *blocks(page, "bash"), *blocks(page, "console")]:
            for line in block.replace("\\\n", " ").splitlines():
                words = line.split("#")[0].removeprefix("$ ").strip()
                if words.startswith("fslora "):
                    found.append((page.name, words))
    return found


def test_the_readme_shows_the_two_commands():
    text = (ROOT / "README.md").read_text()
    assert "make demo" in text
    assert "make test" in text
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", "\n".join(blocks(ROOT / "README.md", "sh")), re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target


@pytest.mark.parametrize(("page", "line"), commands())
def test_every_printed_command_is_one_that_exists(page, line):
    """Parsed by the real command line, without running it; keys given to --set are real keys."""
    words = shlex.split(line)[1:]
    group = typer.main.get_command(app)
    if words[0].startswith("--"):
        group.make_context("fslora", words, resilient_parsing=True)
        return
    command = group.commands[words[0]]
    while hasattr(command, "commands"):
        words = words[1:]
        command = command.commands[words[0]]
    context = command.make_context(words[0], words[1:])
    overrides = list(context.params.get("overrides") or ())
    path = context.params.get("experiment")
    if path is not None and (ROOT / path).exists():
        config.load(ROOT / path, overrides)
    else:
        config.load(None, overrides)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_every_recipe_loads(recipe):
    experiment = config.load(recipe)
    assert experiment.run.rounds > 0


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_and_pictures_are_there(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_configuration_page_is_the_code_s_own():
    """docs/configuration.md holds `fslora init`'s text; FSLORA_REGENERATE_GOLDEN=1 writes it anew."""
    page = ROOT / "docs" / "configuration.md"
    text = CONFIGURATION + "```toml\n" + config.commented_toml(config.load(None)) + "```\n"
    if os.environ.get("FSLORA_REGENERATE_GOLDEN"):
        page.write_text(text)
    assert page.read_text() == text


CONFIGURATION = """# Configuration

Every key, what it means, and the embedded default's value (`fslora init` writes this file). A file needs only what it
changes; keys beside `[variants]` apply to all runs. Any key can be changed for one run with `--set section.key=value`.
Each table under `[variants]` is a further run of the same experiment with some keys changed, drawn on the same page;
a file without variants runs none.

"""


def test_the_readme_s_commands_run(tiny_settings, tmp_path, monkeypatch):
    """The block under "Use", line by line in an empty folder; runs are made tiny by further --set items."""
    from typer.testing import CliRunner

    monkeypatch.chdir(tmp_path)
    block = (ROOT / "README.md").read_text().split("## Use")[1].split("```sh\n")[1].split("```")[0]
    lines = [line.split("#")[0].split() for line in block.splitlines()]
    tiny = [part for item in [*tiny_settings, "run.rounds=1"] for part in ("--set", item)]
    assert len(lines) > 8
    for words in lines:
        extra = tiny if words[1] in ("run", "data") else []
        result = CliRunner().invoke(app, words[1:] + extra)
        assert result.exit_code == 0, (words, result.output, result.exception)
    for path in ("runs/mine/report.html", "adapter-4/adapter_config.json", "merged/model.safetensors"):
        assert (tmp_path / path).is_file(), path
