"""What runs and sites are told: complete, typed, and refused with a remedy; a site's script says what it starts."""

from __future__ import annotations

import subprocess
import sys
import tomllib

import pytest

from fslora import config
from fslora.cli import main
from fslora.deploy import bundle
from fslora.deploy.bundle import write_bundle
from fslora.deploy.clientconfig import Link, script, write_script
from fslora.deploy.launch import local_sites, prepare, settings_of
from fslora.deploy.patience import Patience
from fslora.deploy.settings import KEY, RunSettings, SiteSettings
from fslora.errors import ArtifactError, ConfigError

SITE = SiteSettings(site="north", clients="0,3", storage="/srv/it's here", data="/data/a b.csv", device="cuda:0")


def test_a_site_survives_its_node_config():
    """As Flower reads it: TOML values by key, with spaces between them."""
    assert tomllib.loads(SITE.to_node_config().replace('" ', '"\n')) == SITE.model_dump(exclude_defaults=True)
    cold = SITE.model_copy(update={"idle": 0.0})
    assert "idle=0.0" in cold.to_node_config()
    assert SiteSettings.of({**SITE.model_dump(), "partition-id": 3}) == SITE
    assert SITE.members == {0, 3}


def test_a_site_decides_what_is_read_on_its_machine(tiny_settings):
    experiment = config.load(None, tiny_settings)
    here = SITE.applied(experiment)
    assert (here.data.source, here.model.device) == ("/data/a b.csv", "cuda:0")
    assert here.model.name == experiment.model.name
    own = SITE.model_copy(update={"data": "experiment", "device": "", "model": "/models/base"}).applied(experiment)
    assert (own.data.source, own.model.name) == (experiment.data.source, "/models/base")


@pytest.mark.parametrize("damaged", [{}, {KEY: "{"}, {KEY: '{"run": "a/b"}'}, {"other": 1}])
def test_damaged_settings_are_refused(damaged):
    with pytest.raises(ConfigError, match="settings are damaged"):
        RunSettings.of(damaged)


def test_a_run_is_told_in_one_line_and_keeps_its_name(tiny_settings, tmp_path):
    folder = prepare(config.load(None, tiny_settings), tmp_path / "run")
    settings = settings_of(folder, Patience(5.0, 0.25, 1.0))
    assert RunSettings.of(settings.to_config()) == settings
    assert settings.parsed().variants == {}
    folder.write_json("deployment.json", {"run": settings.run})
    assert settings_of(folder, Patience()).run == settings.run
    assert settings_of(folder, Patience()).digest == settings.digest
    project = tomllib.loads((write_bundle(tmp_path, settings) / "pyproject.toml").read_text())
    assert RunSettings.of(project["tool"]["flwr"]["app"]["config"]) == settings
    assert project["project"]["dependencies"] == []


def test_every_client_is_at_one_local_site(tiny_settings, tmp_path):
    experiment = config.load(None, tiny_settings)
    folder = prepare(experiment, tmp_path / "run")
    sites = local_sites(experiment, folder, 4)
    assert sorted(client for site in sites.values() for client in site.members) == list(range(6))
    assert len({site.storage for site in sites.values()}) == 4
    with pytest.raises(ConfigError, match="--sites is 7; there are 6 clients"):
        local_sites(experiment, folder, 7)


def test_a_script_starts_what_it_says(tmp_path):
    """Run with a stand-in for the SuperNode: the words arrive as they were meant."""
    for name in ("ca.crt", "key"):
        (tmp_path / name).write_text("")
    path = tmp_path / "north.sh"
    write_script(SITE, Link("fl.example.org:8443", tmp_path / "ca.crt", tmp_path / "key", 9100), path)
    fake = tmp_path / "flower-supernode"
    fake.write_text(f"#!{sys.executable}\nimport sys, os\nprint(sys.argv[1:], os.environ['FLWR_TELEMETRY_ENABLED'])\n")
    fake.chmod(0o700)
    said = subprocess.run([path], env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=True).stdout
    words = ["--superlink", "fl.example.org:8443", "--port", "9100", "--node-config", SITE.to_node_config()]
    words += ["--root-certificates", str(tmp_path / "ca.crt"), "--auth-supernode-private-key", str(tmp_path / "key")]
    assert said == f"{words} 0\n"
    with pytest.raises(ArtifactError, match="is there already"):
        write_script(SITE, Link("fl.example.org:8443"), path)
    assert "--insecure" in script(SITE, Link("h:1"))


@pytest.mark.parametrize(
    ("link", "reason"),
    [
        (Link("fl.example.org"), "write HOST:PORT"),
        (Link("h:1", key="there"), "--key needs TLS"),
    ],
)
def test_a_script_that_would_not_work_is_not_written(tmp_path, link, reason):
    with pytest.raises(ConfigError, match=reason):
        write_script(SITE, link, tmp_path / "x.sh")
    assert not (tmp_path / "x.sh").exists()


def test_without_flower_the_command_says_how_to_install_it(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bundle, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["fslora", "deploy", "local", "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "pip install 'fslora[flower]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("--deadline", "-1", "--deadline is -1.0; give seconds, 0 or more"),
        ("--deadline", "nan", "--deadline is nan; give seconds"),
        ("--quorum", "1.5", "--quorum is 1.5; give a share from 0 to 1"),
        ("--wait", "inf", "--wait is inf; give seconds"),
        ("--over-select", "0.5", "--over-select is 0.5; give 1 or more"),
    ],
)
def test_a_patience_that_makes_no_sense_is_refused_before_anything_starts(
    monkeypatch, capsys, tmp_path, option, value, reason
):
    words = ["fslora", "deploy", "local", option, value, "--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_settings_whose_patience_makes_no_sense_are_refused():
    text = RunSettings(run="a", experiment="", folder="").model_dump_json().replace('"quorum":0.5', '"quorum":7.0')
    with pytest.raises(ConfigError, match=r"patience: .*quorum is 7\.0; give a share from 0 to 1"):
        RunSettings.of({KEY: text})
