"""The Space behind its page, without gradio: what is refused, what is read, and what is left afterwards."""

import json
import logging
import os
import re
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from space_world import OWNER_TOKEN, SPACE, USER_TOKEN, publish, save_pair

import zoo
from fake_hub import FakeHub
from lox_hf import LoxConfig, harden_checkpoint, plan_hardening
from lox_hf.errors import ConfigError

from lox_space import jobs, views  # isort: skip
from lox_space.form import Model, Order, read_order, read_repo_id  # isort: skip
from lox_space.jobs import Hardened, JobError, Planned, Workshop  # isort: skip
from lox_space.settings import Settings  # isort: skip

ROOT = Path(__file__).resolve().parents[2]
ORDER = Order(Model("org/aligned"), Model("org/base"), 2, 0.5)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def hub(pair: dict[str, Path]) -> Iterator[FakeHub]:
    """A Hub with the pair, which the workers find; the owner of the Space is logged in on its machine."""
    with FakeHub(USER_TOKEN) as hub, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
            patch.delenv(name)
        for name, value in {"HF_ENDPOINT": hub.url, "HF_TOKEN": OWNER_TOKEN, "HF_HUB_DISABLE_XET": "1"}.items():
            patch.setenv(name, value)
        for name, folder in pair.items():
            publish(hub, f"org/{name}", folder)
        yield hub


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(Settings(), tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def planned(hub: FakeHub, workshop: Workshop) -> Planned:
    return workshop.plan(ORDER)


@pytest.fixture(scope="module")
def hardened(hub: FakeHub, workshop: Workshop, planned: Planned) -> Hardened:
    """Hardened after something else was pushed to the aligned model."""
    hub.repos["org/aligned"].commit({"model.safetensors": b"pushed meanwhile"})
    *shares, hardened = workshop.harden(planned)
    hub.repos["org/aligned"].commits.popitem()
    assert isinstance(hardened, Hardened) and shares == sorted(shares)
    return hardened


def answers(*tasks: dict[str, Any]) -> list[dict[str, Any]]:
    """What a worker answers to each."""
    environment = jobs._environment(Path("/nonexistent")) | {"HF_HOME": tempfile.mkdtemp()}
    paths = os.pathsep.join([environment["PYTHONPATH"], str(ROOT), str(ROOT / "tests")])
    client = [sys.executable, str(ROOT / "tests/integration/space_client.py")]
    done = subprocess.run(
        client, input=json.dumps(tasks), env={**environment, "PYTHONPATH": paths}, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def plan_task(order: Order, max_bytes: int = 10**9) -> dict[str, Any]:
    return {"task": "plan", "order": asdict(order), "max_bytes": max_bytes}


def read(aligned: str = "org/aligned", base: str = "org/base", allow_folders: bool = False, **fields: Any) -> Order:
    given = {"aligned_revision": "", "base_revision": "", "r": 6, "alpha": 1.25} | fields
    return read_order(aligned=aligned, base=base, allow_folders=allow_folders, **given)


def test_the_form_is_read() -> None:
    order = read(" org/aligned ", "gpt2", aligned_revision="refs/pr/1", r=6.0)
    assert order == Order(Model("org/aligned", "refs/pr/1"), Model("gpt2"), 6, 1.25)


NO_HUB_IDS = """/etc ~ ~/models . .. ../secrets org/.. org/../../etc ./org/model org/model/more org/model.git org/a--b
org/.hidden org\\model C:/models file:///etc <b>org/model</b> http://localhost/org/model""".split()


@pytest.mark.parametrize("name", [*NO_HUB_IDS, "a b", "org/" + "a" * 400])
@pytest.mark.parametrize("role", ["aligned", "base"])
def test_only_hub_ids_are_taken(role: str, name: str) -> None:
    with pytest.raises(ConfigError, match=r"not the id of a model on the Hub|too long"):
        read(**{role: name})


def test_a_folder_needs_the_owners_leave(pair: dict[str, Path]) -> None:
    aligned = str(pair["aligned"])
    with pytest.raises(ConfigError, match="is not the id of a model on the Hub"):
        read(aligned)
    assert read(aligned, allow_folders=True).aligned == Model(aligned)
    with pytest.raises(ConfigError, match="and not a folder on this machine"):
        read(aligned + "/none", allow_folders=True)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"aligned": " "}, "Name the aligned model"),
        ({"base": ""}, "Name the base model"),
        ({"aligned_revision": "../main"}, "not a branch, a tag or a commit of the aligned"),
        ({"base_revision": "a b"}, "not a branch, a tag or a commit of the base"),
        ({"r": 0}, "whole number from 1"),
        ({"r": 2.5}, "whole number from 1"),
        ({"r": None}, "whole number from 1"),
        ({"alpha": -1}, "above 0"),
        ({"alpha": float("nan")}, "above 0"),
    ],
)
def test_other_fields(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        read(**fields)


@pytest.mark.parametrize("name", ["", "model", "a/b/c", "../model", "org/..", "org/mo del"])
def test_where_to_push(name: str) -> None:
    assert read_repo_id(" me/model-lox ") == "me/model-lox"
    with pytest.raises(ConfigError, match="with its owner"):
        read_repo_id(name)


def test_the_owners_settings() -> None:
    assert Settings.from_environment({}) == Settings(6 * 10**9, allow_folders=False)
    given = {"LOX_SPACE_MAX_GB": "0.5", "LOX_SPACE_ALLOW_FOLDERS": "1"}
    assert Settings.from_environment(given) == Settings(5 * 10**8, allow_folders=True)
    for wrong in ("many", "0", "-1", "nan", "inf"):
        with pytest.raises(SystemExit, match="LOX_SPACE_MAX_GB is the size"):
            Settings.from_environment({"LOX_SPACE_MAX_GB": wrong})


def test_the_plan_is_that_of_the_whole_models(
    planned: Planned, hub: FakeHub, pair: dict[str, Path], workshop: Workshop
) -> None:
    local = plan_hardening(pair["aligned"], LoxConfig(str(pair["base"]), r=2, alpha=0.5))
    assert planned.plan.tensors == local.tensors and planned.plan.total_bytes == local.total_bytes
    for role in ("aligned", "base"):
        reference = getattr(planned.plan, role)
        assert (reference.name_or_path, reference.revision) == (f"org/{role}", hub.head(f"org/{role}"))
    files = [path.stat().st_size for folder in pair.values() for path in folder.iterdir()]
    assert local.total_bytes * 2 <= planned.download_bytes <= sum(files)


def test_the_commits_of_the_plan_are_hardened(
    hardened: Hardened, planned: Planned, pair: dict[str, Path], tmp_path: Path, workshop: Workshop
) -> None:
    harden_checkpoint(pair["aligned"], tmp_path / "local", LoxConfig(str(pair["base"]), r=2, alpha=0.5))
    ours = hardened.folder / "output" / "hardened"
    assert zoo.same_bits(*(zoo.read_checkpoint(folder) for folder in (ours, tmp_path / "local")))
    assert hardened.report.aligned.revision == planned.aligned["revision"]
    assert "not evaluated" in hardened.card and "org/aligned" in hardened.card and not hardened.card.startswith("---")
    text = (ours / "lox_report.json").read_text() + (ours / "config.json").read_text()
    assert str(workshop.folder) not in text  # a published file says nothing of the machine of the page


def test_nobodys_login_reads_models_and_nothing_is_left(hardened: Hardened, hub: FakeHub, workshop: Workshop) -> None:
    assert list(workshop.folder.iterdir()) == [hardened.folder]
    assert {path.name for path in hardened.folder.iterdir()} == {"output"}  # the downloads are gone
    reads = [logged_in for method, path, logged_in in hub.requests if method == "GET" and "/me/" not in path]
    assert len(reads) > 10 and not any(reads)
    environment = jobs._environment(Path("folder"))
    assert "HF_TOKEN" not in environment and OWNER_TOKEN not in str(environment)
    assert environment["HF_ENDPOINT"] == hub.url and "PATH" in environment


def test_pushed_with_the_users_token_which_is_nowhere(
    hardened: Hardened,
    hub: FakeHub,
    workshop: Workshop,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(JobError, match="Cannot upload to 'me/model-lox': HTTP 401") as error:
        workshop.push(hardened, "me/model-lox", "hf_NotTheToken", public=True)
    assert "hf_NotTheToken" not in str(error.value) and "me/model-lox" not in hub.repos
    url = workshop.push(hardened, "me/model-lox", f" {USER_TOKEN}\n", public=False)
    repo = hub.repos["me/model-lox"]
    assert repo.private and url.endswith(hub.head("me/model-lox"))
    stored = repo.at("main")[1]
    assert {"config.json", "lox_config.json", "lox_report.json", "model.safetensors", "README.md"} <= stored.keys()
    said = capfd.readouterr()
    files = [path.read_bytes() for path in workshop.folder.rglob("*") if path.is_file()]
    everything = [*files, *stored.values(), *(text.encode() for text in (*said, caplog.text, repr(hardened), url))]
    assert len(files) > 3 and not any(
        token in data for data in everything for token in (b"hf_Not", USER_TOKEN.encode())
    )


@pytest.mark.parametrize("token", ["", " ", "two words", "hf_\N{SNOWMAN}", "hf_" + "a" * 600])
def test_what_is_no_token(token: str, hardened: Hardened, workshop: Workshop) -> None:
    with pytest.raises(ConfigError, match="Paste a token") as error:
        workshop.push(hardened, "me/model-lox", token, public=True)
    assert not token.strip() or token not in str(error.value)


def test_a_model_that_is_not_kept(hardened: Hardened, workshop: Workshop, tmp_path: Path) -> None:
    other = replace(hardened, folder=tmp_path / "other")
    other.folder.mkdir()
    workshop.drop(other)
    with pytest.raises(JobError, match="not kept any more"):
        workshop.push(other, "me/model-lox", USER_TOKEN, public=True)
    assert hardened.folder.is_dir()


def test_one_at_a_time_and_who_leaves_ends_the_job(hardened: Hardened, planned: Planned, workshop: Workshop) -> None:
    before = threading.active_count()
    for _ in range(2):  # the second time shows that the next one may begin
        running = workshop.harden(planned)
        assert isinstance(next(running), float)
        with pytest.raises(JobError, match="one is done at a time"):
            next(workshop.harden(planned))
        running.close()
        assert list(workshop.folder.iterdir()) == [hardened.folder] and threading.active_count() == before


def test_a_job_that_takes_too_long_is_ended(hub: FakeHub, tmp_path: Path) -> None:
    workshop = Workshop(replace(Settings(), job_seconds=0.2), tmp_path)
    with pytest.raises(JobError, match="longer than"):
        workshop.plan(ORDER)
    assert list(tmp_path.iterdir()) == []


def test_too_little_disk(planned: Planned, workshop: Workshop) -> None:
    huge = replace(planned, aligned={**planned.aligned, "download_bytes": 10**18})
    with pytest.raises(JobError, match=r"needs 1e\+09 GB of disk"):
        next(workshop.harden(huge))


def test_a_crash_is_for_the_owner(
    hardened: Hardened, workshop: Workshop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(jobs.sys, "executable", "/bin/cat")  # which knows no such options
    with pytest.raises(JobError, match="the owner finds it in the log"):
        workshop.push(hardened, "me/model", USER_TOKEN, public=False)
    with pytest.raises(JobError):
        jobs._answer(1, b"", f"ValueError: {USER_TOKEN}".encode(), USER_TOKEN)
    assert "ValueError: ***" in caplog.text and USER_TOKEN not in caplog.text


def header(tensors: dict[str, Any], length: int) -> bytes:
    data = json.dumps(tensors).encode()
    return struct.pack("<Q", len(data)) + data + bytes(length)


HUGE = header({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}, 16)
OUTSIDE = json.dumps({"metadata": {}, "weight_map": {"a": "../../../../tmp/outside.safetensors"}}).encode()
FOREIGN: dict[str, tuple[dict[str, bytes | None], str]] = {
    "a header beyond its file": ({"model.safetensors": HUGE}, "shorter than its header says"),
    "no safetensors": ({"model.safetensors": b"no header at all"}, "cannot be read"),
    "files outside": ({"model.safetensors": None, "model.safetensors.index.json": OUTSIDE}, "'org/bad-2'"),
    "no weights": ({"model.safetensors": None}, "no safetensors weights, and no others are read"),
    "an adapter": ({"model.safetensors": None, "adapter_config.json": b"{}"}, "is a LoRA adapter"),
    "no config": ({"config.json": b"<script>"}, "Cannot read"),
}


def test_foreign_files_are_not_trusted(hub: FakeHub, pair: dict[str, Path], workshop: Workshop) -> None:
    orders = []
    for number, (files, _) in enumerate(FOREIGN.values()):
        repo = publish(hub, f"org/bad-{number}", pair["aligned"])
        content = {**repo.at("main")[1], **files}
        repo.commits = {}
        repo.commit({name: data for name, data in content.items() if data is not None})
        orders.append(replace(ORDER, aligned=Model(f"org/bad-{number}")))
    for (_, match), found in zip(FOREIGN.values(), answers(*map(plan_task, orders)), strict=True):
        assert re.search(match, found["error"]), found
        assert found["folder"] not in found["error"] and "Traceback" not in found["error"]


def test_what_is_refused_is_said(hub: FakeHub, pair: dict[str, Path]) -> None:
    publish(hub, "org/private", pair["aligned"], private=True)
    publish(hub, "org/gated", pair["aligned"], gated=True)
    cases = {
        "'org/nothing' is no public model on the Hub": replace(ORDER, aligned=Model("org/nothing")),
        "'org/private' is no public model on the Hub: this page reads neither": replace(
            ORDER, base=Model("org/private")
        ),
        "'org/gated' is no public model on the Hub": replace(ORDER, aligned=Model("org/gated")),
        "'org/base' has no revision 'v9'": replace(ORDER, base=Model("org/base", "v9")),
        "r exceeds the smaller side": replace(ORDER, r=10**6),
    }
    for match, found in zip(cases, answers(*map(plan_task, cases.values())), strict=True):
        assert re.search(match, found.get("error", "")), (match, found)


def test_a_large_model_is_refused_before_any_download(hub: FakeHub, pair: dict[str, Path]) -> None:
    for role in ("aligned", "base"):
        publish(hub, f"org/large-{role}", pair[role]).commit({"model-00009.safetensors": bytes(2_000_000)})
    orders = [replace(ORDER, **{role: Model(f"org/large-{role}")}) for role in ("aligned", "base")]
    hub.requests.clear()
    for role, found in zip(("aligned", "base"), answers(*(plan_task(o, 1_900_000) for o in orders)), strict=True):
        message = rf"'org/large-{role}' has 0\.00\d+ GB to read, and this page takes models up to 0\.0019 GB"
        assert re.search(message, found["error"]), found
    assert not [path for _, path, _ in hub.requests if "/resolve/" in path or path.startswith("/store/")]


def test_a_plan_takes_headers_only(hub: FakeHub, pair: dict[str, Path]) -> None:
    (found,) = answers(plan_task(ORDER))
    assert found["result"]["plan"]["total_bytes"] > 100_000 and found["used_bytes"] < 100_000, found["used_bytes"]


def test_folders_of_this_machine(pair: dict[str, Path]) -> None:
    order = Order(Model(str(pair["aligned"])), Model(str(pair["base"])), 2, 0.5)
    (found,) = answers(plan_task(order))
    assert found["result"]["aligned"]["download_bytes"] == 0 and found["result"]["plan"]["total_bytes"] > 0


def test_names_are_shown_as_text(planned: Planned) -> None:
    evil = "<img src=x onerror=alert(1)>"
    tensor = replace(planned.plan.tensors[0], name=evil, reason=evil, edit=False, dtype=evil)
    shown = views.show_plan(replace(planned, plan=replace(planned.plan, tensors=(tensor,), warnings=(evil,))))
    pages = [shown, views.show_error(evil), views.show_busy(evil), views.show_pushed(f'https://x/"{evil}')]
    pages.append(views.show_pushed("javascript:alert(1)"))
    assert all("<img" not in page and "&lt;img" in page for page in pages[:4])
    assert 'href="https://x/&quot;' in pages[3] and "href" not in pages[4]


def test_the_page_alone_knows_gradio() -> None:
    modules = (SPACE / "lox_space").glob("*.py")
    assert [path.name for path in modules if "import gradio" in path.read_text()] == ["page.py"]
