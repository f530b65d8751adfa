"""The Hub, both ways, against a stand-in on localhost: ids, commits, cards, uploads, and what goes wrong."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import zoo
from fake_hub import FakeHub, Repo
from lox_hf import LoxConfig, harden_checkpoint

TOKEN = "hf_TheSecretOfThisTest"
CLIENT = Path(__file__).parent / "hub_client.py"


@dataclass
class World:
    """The server, the client's folder, and all that the client printed."""

    hub: FakeHub
    root: Path
    results: dict[str, Any] = field(default_factory=dict)
    printed: list[str] = field(default_factory=list)

    def run(self, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run Python in a process of its own that knows no Hub but this one, in the client's folder."""
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        hub = {"HF_ENDPOINT": self.hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(self.root / "home")}
        switches = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=self.root,
            env={**ours, **hub, **switches, "PYTHONPATH": str(CLIENT.parents[1]), **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )
        self.printed += [done.stdout, done.stderr]
        return done

    def client(self, *names: str, **environment: str) -> dict[str, Any]:
        """Run functions of the client."""
        done = self.run(CLIENT, self.root, *names, **environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    def reference(self, name: str) -> dict[str, str]:
        """How a report names a repository."""
        return {"name_or_path": f"org/{name}", "revision": self.hub.head(f"org/{name}")}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A Hub with a pair, an adapter and difficult repositories, and what the client found there."""
    root = tmp_path_factory.mktemp("hub")
    pair = zoo.save_pair("llama_tied", root)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_pretrained(pair.base_dir), settings).save_pretrained(root / "adapter")
    with FakeHub(TOKEN) as hub:
        hub.repos |= {"org/gated": Repo(gated=True), "org/full": Repo(refuses_uploads=True)}
        hub.repos["org/gated"].commit({"config.json": b"{}", "model.safetensors": b"weights"})
        hub.repos["org/full"].commit({})
        hub.repos["org/hidden"] = Repo(private=True)
        world = World(hub, root)
        world.results = world.client("upload", "config", "subspace", "harden", "errors", "command_line")
        yield world


def test_the_stand_in_keeps_what_is_uploaded(world: World) -> None:
    name, *files = world.results["upload"]
    assert name == "org" and {"adapter_model.safetensors", "adapter_config.json"} <= set(files)
    stored = world.hub.repos["org/aligned"].at("main")[1]
    assert all(stored[path.name] == path.read_bytes() for path in (world.root / "aligned").iterdir())


def test_a_config_comes_back(world: World) -> None:
    assert world.results["config"] == {"same": True, "newest": True}
    assert len(world.hub.repos["org/config"].commits) == 3  # one that made the repository, and one per upload


def test_a_subspace_comes_back_bit_for_bit(world: World) -> None:
    found = world.results["subspace"]
    assert found.pop("models") == {**world.reference("aligned"), "base": world.reference("base")}
    assert found == dict.fromkeys(("names", "bits", "config", "report"), True)
    assert world.hub.repos["org/subspace"].private and len(world.hub.repos["org/subspace"].commits) == 2
    harden_checkpoint(world.root / "aligned", world.root / "local-2", LoxConfig(str(world.root / "base"), r=2))
    by_subspace, dense = (zoo.read_checkpoint(world.root / name) for name in ("by-subspace", "local-2"))
    for name, tensor in dense.items():
        # The two find the directions with other starting widths: at most a rounding of bfloat16 apart.
        torch.testing.assert_close(by_subspace[name], tensor, rtol=2**-7, atol=1e-5)


def test_reports_and_stamp_name_both_commits(world: World) -> None:
    found, both = world.results["harden"], [world.reference("aligned"), world.reference("base")]
    assert found["plan"] == both and found["report"] == both
    report = json.loads((world.root / "hardened/lox_report.json").read_text())
    assert [report["aligned"], report["base"]] == both
    stamp = json.loads((world.root / "hardened/config.json").read_text())["lox_config"]
    assert [stamp["aligned_model_name_or_path"], stamp["aligned_revision"]] == list(both[0].values())
    assert [stamp["base_model_name_or_path"], stamp["revision"]] == list(both[1].values())


def test_a_plan_reads_headers_alone(world: World) -> None:
    hardened, planned = world.results["harden"]["kept"]
    assert hardened and not planned


def test_ids_give_the_weights_that_folders_give(world: World) -> None:
    harden_checkpoint(world.root / "aligned", world.root / "local", LoxConfig(str(world.root / "base"), r=2))
    hardened, local = (zoo.read_checkpoint(world.root / name) for name in ("hardened", "local"))
    assert zoo.same_bits(hardened, local)


def test_cards_private_models_and_adapters(world: World) -> None:
    found = world.results["harden"]
    assert found["carded"] == [world.reference("base"), "README.md"]
    assert found["private"] == "org/private"
    assert found["adapter"] == [world.reference("adapter"), None, 2]  # no config.json, no base: q_proj of two layers
    assert "config.json" not in world.hub.repos["org/adapter"].at("main")[1]
    assert (world.root / "hardened-adapter/adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("case", "match"),
    [
        ("unknown repo", "'org/nothing' is neither a folder on this machine nor a model on the Hub; .*hf auth login"),
        ("unknown base", "'org/nothing' is neither a folder on this machine nor a model on the Hub; .*hf auth login"),
        ("no login", "'org/hidden' is neither .*for a private one run `hf auth login`"),
        ("no such repo for a file", "'org/nothing' is neither .* nor a model on the Hub"),
        ("unknown branch", "'org/aligned' has no revision 'v9': pass a branch, a tag or a whole commit"),
        ("unknown commit", "'org/aligned' has no revision '0000000000000000000000000000000000000000': pass a branch"),
        ("base revision", "'org/base' has no revision 'v9'"),
        ("file revision", "'org/config' has no revision 'v9'"),
        ("missing file", "'org/aligned' has no lox_config.json on the Hub: is it the repository meant"),
        ("no weights", "aligned 'org/config'.*safetensors"),
        ("gated", "'org/gated' is gated: ask for access on its Hub page, then log in with `hf auth login`"),
        ("gated file", "'org/gated' is gated: ask for access"),
        ("push without login", "Cannot upload to 'org/new': HTTP 401, Invalid username or password.*hf auth login"),
        ("push to no id", "'not an id' is not a Hub id such as 'org/model'"),
        ("upload refused", "Cannot upload to 'org/full': HTTP 403, Storage limit reached.*the token may write there"),
    ],
)
def test_what_the_hub_refuses(case: str, match: str, world: World) -> None:
    message = world.results["errors"][case]
    assert message.startswith("CheckpointError: ") and "\n" not in message
    assert re.search(match, message), message


def test_a_hub_that_is_down_or_switched_off(world: World) -> None:
    with socket.socket() as unused:  # bound and not listening: connections are refused
        unused.bind(("127.0.0.1", 0))
        down = {"HF_ENDPOINT": f"http://127.0.0.1:{unused.getsockname()[1]}"}
        refused = world.client("unreachable", **down)
        offline = world.client("unreachable", "files_offline", "cached", HF_HUB_OFFLINE="1", **down)
    assert offline.pop("cached") == {"plan": "no error", "config": "no error"}
    for results, reason in ((refused, "refused"), (offline, "offline mode is enabled")):
        for name, text in [item for part in results.values() for item in part.items()]:
            start, remedy = ("'org/", "Check the connection, HF_ENDPOINT and HF_HUB_OFFLINE, or pass a folder.")
            if name == "push":
                start, remedy = ("Cannot upload to 'org/other'", "Check that the Hub is in reach")
            assert text.startswith(f"CheckpointError: {start}") and "\n" not in text
            assert reason in text and remedy in text
    assert not (world.root / "never").exists()


def test_the_command_line_takes_ids(world: World) -> None:
    done = world.run("-m", "lox_hf.cli", "harden", "org/carded", "--r", 2)
    assert done.returncode == 0, done.stderr
    assert "org/base (named by README.md of the aligned model)" in done.stdout
    hardened, same = (zoo.read_checkpoint(world.root / name) for name in ("carded-lox", "hardened"))
    assert zoo.same_bits(hardened, same)
    assert not (world.root / "carded-lox/README.md").exists()  # the aligned model's card does not fit the result


def test_the_command_line_explains_mistakes(world: World) -> None:
    done = world.results["command_line"]
    assert (done["code"], done["out"]) == (2, "") and "Traceback" not in done["err"]
    assert "lox-hf: error: 'org/gated' is gated: ask for access" in done["err"]


def test_the_token_goes_to_the_hub_and_nowhere_else(world: World) -> None:
    """Runs last: nothing printed, written or uploaded holds the token, and the store of files never gets it."""
    assert any(logged_in for _, path, logged_in in world.hub.requests if path.startswith("/api/"))
    assert not any(logged_in for _, path, logged_in in world.hub.requests if path.startswith("/store/"))
    assert not any(TOKEN in text for text in world.printed)
    written = {path: path.read_bytes() for path in world.root.rglob("*") if path.is_file()}
    assert len(written) > 100 and not [path for path, data in written.items() if TOKEN.encode() in data]
    uploaded = [
        data for repo in world.hub.repos.values() for files in repo.commits.values() for data in files.values()
    ]
    assert not any(TOKEN.encode() in data for data in uploaded)
