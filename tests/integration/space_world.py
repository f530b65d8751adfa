"""What the tests of the Space share: its code on the path, a pair on a stand-in for the Hub, and the token."""

import sys
from pathlib import Path

import zoo
from fake_hub import FakeHub, Repo

SPACE = Path(__file__).resolve().parents[2] / "examples" / "space"
if str(SPACE) not in sys.path:
    sys.path.insert(0, str(SPACE))

OWNER_TOKEN = "hf_TokenOfTheOwnerOfTheSpace"
USER_TOKEN = "hf_TokenOfAVisitor"


def save_pair(root: Path) -> dict[str, Path]:
    """An aligned model in one file and a base in shards, in folders of `root`."""
    pair = zoo.save_pair("llama_tied", root, max_shard_size="1GB", base_max_shard_size="20KB")
    return {"aligned": Path(pair.aligned_dir), "base": Path(pair.base_dir)}


def publish(hub: FakeHub, name: str, folder: Path, **about: bool) -> Repo:
    """Put a folder on the stand-in."""
    hub.repos[name] = repo = Repo(**about)
    repo.commit({str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()})
    return repo
