"""Where a hardened model goes shard by shard: uploads that nobody sees, and one commit that shows them all."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from lox_hf.errors import OutputError, listing
from lox_hf.harden import files_of, other_files, shards_of
from lox_hf.hub.artefact import Artefact, is_published
from lox_hf.hub.card import PICTURE_NAME, card_warnings, check_repo_id, make_card
from lox_hf.hub.evidence import Evidence
from lox_hf.hub.metadata import inherit
from lox_hf.hub.push import draw_picture, refuse_public, stale_files
from lox_hf.hub_files import check_token, upload_errors
from lox_hf.inputs import Pair
from lox_hf.records import HardeningPlan, HardeningReport
from lox_hf.version import __version__
from lox_hf.weights.folder import CARD, WEIGHT_SUFFIXES
from lox_hf.weights.source import INDEX_NAME, WEIGHTS_NAME

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd


UNMEASURED = "Nothing was measured of this model, and its card says so: measure it (lox-hf asr) before you rely on it."


class Repository:
    """Where the result goes: shards are sent one by one, and one commit shows them all.

    Args:
        repo_id: Hub id.
        token: Hub token; None uses the stored login.

    Raises:
        ConfigError: If the id or the token is none.
    """

    def __init__(self, repo_id: str, token: str | bool | None) -> None:
        import huggingface_hub

        check_repo_id(repo_id)
        check_token(token)
        self.repo_id, self.token = repo_id, token
        self._there: frozenset[str] = frozenset()
        self._api = huggingface_hub.HfApi(token=token, library_name="lox_hf", library_version=__version__)
        self._sent: list[CommitOperationAdd] = []

    def check(self, pair: Pair, *, private: bool) -> None:
        """Refuse one that is an input, holds other weights that would stay, or is public and should not be."""
        from huggingface_hub import errors

        inputs = [side.name_or_path for side in (pair.aligned.reference, pair.factors.reference) if side is not None]
        if self.repo_id.lower() in (name.lower() for name in inputs):
            raise OutputError(f"The output '{self.repo_id}' is an input: choose another repository.")
        with upload_errors(self.repo_id):
            try:
                found = self._api.model_info(self.repo_id)
            except errors.RepositoryNotFoundError:
                return
        self._there = frozenset(sibling.rfilename for sibling in found.siblings or [])
        names = {shard.name for shard in shards_of(pair)}
        names |= {INDEX_NAME} if names != {WEIGHTS_NAME} else set()
        others = sorted(name for name in self._there - names if name.endswith((*WEIGHT_SUFFIXES, ".index.json")))
        if others:
            raise OutputError(
                f"The output '{self.repo_id}' holds other weights, which would stay beside the hardened ones: "
                f"{listing(others)} Choose a new repository, or delete them there first."
            )
        if private:
            refuse_public(self.repo_id, found.private)

    def create(self, *, private: bool) -> None:
        """Make the repository if there is none."""
        with upload_errors(self.repo_id):
            self._api.create_repo(self.repo_id, private=private, exist_ok=True)

    def send(self, path: Path) -> None:
        """Upload a file that the commit will name, and delete it here; the Hub takes no content twice."""
        import huggingface_hub

        with upload_errors(self.repo_id):
            addition = huggingface_hub.CommitOperationAdd(path.name, path)
            self._api.preupload_lfs_files(self.repo_id, [addition])
        self._sent.append(addition)
        if isinstance(addition.path_or_fileobj, bytes):  # the client has let go of the file; one too small it keeps
            path.unlink()

    def publish(self, pair: Pair, plan: HardeningPlan, report: HardeningReport, message: str) -> str:
        """Make the one commit, which takes away what was measured of an earlier model, and return its URL."""
        import huggingface_hub

        others = other_files(pair, plan, report)
        files = {name: content for name, content in others.items() if is_published(name)}
        files |= self._card(pair, report, tuple(files))
        stale = stale_files(self._there, {*files, *(addition.path_in_repo for addition in self._sent)})
        with upload_errors(self.repo_id):
            operations = [
                *(huggingface_hub.CommitOperationDelete(name) for name in stale),
                *self._sent,
                *(huggingface_hub.CommitOperationAdd(name, content) for name, content in files.items()),
            ]
            done = self._api.create_commit(self.repo_id, operations, commit_message=message)
        return str(done.commit_url)

    def _card(self, pair: Pair, report: HardeningReport, files: tuple[str, ...]) -> dict[str, Path | bytes]:
        """The card and its picture; what it warns readers of is told here too."""
        artefact = Artefact(
            folder=files_of(pair).folder,
            kind="checkpoint",
            config=pair.config,
            aligned=pair.aligned.reference,
            base=pair.factors.reference,
            report=report,
            version=__version__,
            files=files,
        )
        picture, inherited = draw_picture(report), inherit(artefact, token=self.token)
        for line in (*card_warnings(artefact, Evidence(), inherited), UNMEASURED):
            warnings.warn(line, stacklevel=4)
        card = make_card(artefact, repo_id=self.repo_id, inherited=inherited, picture=picture is not None)
        return {CARD: str(card).encode(), **({} if picture is None else {PICTURE_NAME: picture})}
