"""The resident worker: what the server asks over the link becomes work on this site's data, and results.

Nothing that the server sends is trusted: a spec is checked as a file would be, names of folders in it mean nothing here,
the site's policy is asked before anything is loaded, and what goes wrong with the site's own data or model is told to the
site's log alone, because such errors name rows and values.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from ..protocols import link
from ..protocols import link_pb2 as pb
from ..protocols.blobs import digest
from ..protocols.errors import FedaptError, PayloadError, PrivacyError, RunError, SpecError
from ..protocols.exchange import Answer, Exchange
from ..protocols.layout import Flat
from ..protocols.legality import recipe_of
from ..protocols.spec import RunSpec
from ..protocols.update import Assignment, Description, Update, refused
from .accounts import SiteAccounts
from .evaluation import score
from .exchanger import Exchanger
from .halfway import Halfway
from .loading import Loaded, load
from .shelf import Shelf
from .site import Site
from .slopes import exchanger_of
from .status import Status

logger = logging.getLogger(__name__)

Save = Callable[[Path, Description, Flat], None]
"""Writes an adapter as a folder that peft loads: the facade brings it, because the server's layer has it."""

MOST_EXCHANGERS = 16
"""Runs of zeroth order at once: each holds an adapter, and a server can name runs without end."""

ACCOUNTS, ADAPTERS, HALFWAY, RESULTS = "accounts", "adapters", "halfway.safetensors", "results"
SHELF = "kept.sqlite"

TOLD = (SpecError, PayloadError, PrivacyError)
"""What the server may read: the texts of other errors name files, rows and values of this site."""

Result = tuple[pb.Result, bytes]


def unanswered(body: bytes) -> bytes:
    """The answer of a node that fails at an exchange, whatever was in it."""
    number = int.from_bytes(body[:4], "little") % 2**30
    return Answer(0, number, "refused", reason="an error at this site, which its operator finds in its log").to_bytes()


class Resident:
    """One site's worker, in its `folder`. The model of the last spec stays loaded.

    A round that was cut off goes on from where it was kept. Under `privacy.unit = "example"` it begins anew, with noise
    that is drawn anew, and is charged once more: nothing of the first try has left. `trained` is the last question that was
    answered with an update.

    Raises PrivacyError and OutputError as SiteAccounts, before anything is asked of it.
    """

    def __init__(self, site: Site, node: int, folder: Path, *, save: Save, status: Status) -> None:
        self.site, self.node, self.folder = site, node, folder
        self.save, self.status = save, status
        self.accounts = SiteAccounts(folder / ACCOUNTS)
        self.halfway = Halfway(folder / HALFWAY, site.train.checkpoint_seconds)
        self.shelf = Shelf(folder / SHELF)
        self.trained = b""
        self._loaded: Loaded | None = None
        self._exchangers: dict[str, Exchanger] = {}

    def work(self, question: pb.Question, spec: bytes, payload: bytes) -> Result:
        """Raises FedaptError where it cannot be done; its message may be told to the server."""
        kind = pb.Kind.Name(question.kind).lower()
        self.status.doing(f"{kind} {question.run} round {question.round}")
        try:
            return self._answer(question, read_spec(spec, question.run), payload)
        except TOLD:
            raise
        except FedaptError as error:
            logger.error("%s, run %s: %s", kind, question.run, error)
            raise RunError(f"{type(error).__name__} at this site, which its operator finds in its log") from None
        except Exception as error:
            logger.exception("%s, run %s", kind, question.run)
            raise RunError(f"{type(error).__name__} at this site, which its operator finds in its log") from None
        finally:
            self.status.doing("idle")

    def exchange(self, body: bytes) -> bytes:
        """What a frame asks of a run that is known here; of another one, this node says that it is lost."""
        try:
            return self._exchanged(body)
        except Exception:  # a resident outlives it, and the server counts answers
            logger.exception("a zeroth-order exchange failed")
            return unanswered(body)

    def _exchanged(self, body: bytes) -> bytes:
        request = Exchange.from_bytes(self.node, body)
        if request.run not in self._exchangers:
            return Answer(self.node, request.number, "lost").to_bytes()
        (answer,) = self._exchangers[request.run].answer([request])
        return answer.to_bytes()

    def _answer(self, question: pb.Question, spec: RunSpec, payload: bytes) -> Result:
        asked = link.assignment(question, self.node, payload)
        match question.kind:
            case pb.DESCRIBE:
                described = link.description_to_bytes(self._describe(spec))
                return _result(question, payload=described), described
            case pb.TRAIN:
                update = self._train(spec, asked)
                self.trained = question.id
                return link.result(question, update), update.payload
            case pb.EVALUATE:
                return self._evaluate(spec, asked, question), b""
            case pb.ADOPT:
                self._adopt(spec, asked)
                return _result(question), b""
            case pb.EXCHANGE:
                self._meet(spec)
                answer = self._exchanged(payload)
                return _result(question, payload=answer), answer
        raise PayloadError(f"a question of kind {question.kind} is not known here: upgrade this node's fedapt")

    def _describe(self, spec: RunSpec) -> Description:
        found = self._allowed(spec).client.describe()
        # Where a base lies here is nobody else's affair, and of no use to them.
        config = dict(found.config)
        if self.site.base_of(spec.model.base) is not None:
            config["base_model_name_or_path"] = spec.model.base
        return Description(found.layout, found.start, config, found.base)

    def _train(self, spec: RunSpec, asked: Assignment) -> Update:
        started = time.monotonic()
        objections = self.site.problems(spec)
        if asked.round > spec.run.rounds:  # else a limit on rounds would be one on what the server says
            objections.append(f"round {asked.round} of a run of {spec.run.rounds}")
        own = ""
        if objections:
            update = refused(asked, " ".join(objections))
        else:
            client = self._client(spec).client
            self.halfway.begin(_identity(spec, asked))
            (update,) = client.train([asked])
            own = client.reasons.get(asked, "")
        facts: dict[str, float | str] = {"loss": update.metrics["loss"]} if "loss" in update.metrics else {}
        facts |= {"reason": own or update.reason} if update.reason else {}
        seconds = round(time.monotonic() - started, 2)
        self.status.round(run=asked.run, round=asked.round, kind=update.kind, seconds=seconds, **facts)
        return update

    def _evaluate(self, spec: RunSpec, asked: Assignment, question: pb.Question) -> pb.Result:
        """Scores of the adapter on the site's own data, where policy and privacy let exact scores leave."""
        self.site.policy.require_evaluation()
        loaded = self._allowed(spec)
        scoring = loaded.scoring()
        scoring.load(asked)
        metrics = scoring.evaluate(self.node).metrics(scoring.adapted.task)
        return _result(question, weight=float(len(loaded.evaluation)), metrics=metrics)

    def _adopt(self, spec: RunSpec, asked: Assignment) -> None:
        """Keep the run's adapter, and what it does to this site's scores: those stay here."""
        loaded = self._allowed(spec)
        client, folder = loaded.client, self.folder / ADAPTERS / spec.run.name
        scores = {}
        client.adapted.write(client.start)
        scores["before"] = score(client.adapted, loaded.evaluation).metrics(client.adapted.task)
        client.load(asked)
        adapter = client.adapted.read()
        scores["after"] = score(client.adapted, loaded.evaluation).metrics(client.adapted.task)
        self.save(folder, client.describe(), adapter)
        own = json.dumps({"version": asked.version, **scores}, indent=2)
        (folder / "evaluation.json").write_text(own + "\n", encoding="utf-8")
        logger.info("%s: the adapter of run %s; own data: %s", folder, spec.run.name, scores)
        self.shelf.drop(spec.run.name)
        self.status.round(run=asked.run, round=asked.round, kind="adopted", **scores)

    def _meet(self, spec: RunSpec) -> None:
        """Be ready for the exchanges of a run: a refusal of the site's policy is an answer to each."""
        client = self._allowed(spec).client
        if spec.run.name not in self._exchangers:
            self._exchangers[spec.run.name] = exchanger_of(client)
        if len(self._exchangers) > MOST_EXCHANGERS:  # asked again, the oldest says that it is lost
            del self._exchangers[next(iter(self._exchangers))]

    def _allowed(self, spec: RunSpec) -> Loaded:
        """The client of a spec. Raises PrivacyError, if it can without loading a model, where the policy objects."""
        objections = self.site.problems(spec) or self._client(spec).client.objections
        if objections:
            raise PrivacyError(" ".join(objections))
        return self._client(spec)

    def _client(self, spec: RunSpec) -> Loaded:
        """The client of a spec. The model that is there stays where it would be loaded the same.

        Questions of several runs may alternate, so what rounds leave for the next lies beside the client.
        """
        found = self._loaded
        if found is None or _of_model(found.client.spec) != _of_model(spec):
            self._loaded = None  # two models at once may not fit
            self._exchangers.clear()
            found = load(self.site, spec, self.node, self.accounts, self.halfway)
            found = replace(found, client=found.client.affording(self.site.train.most_rank or 0))
        elif found.client.spec != spec:
            found = Loaded(found.client.under(spec).keeping(self.accounts), found.evaluation)
        if found is not self._loaded:
            found = self._loaded = replace(found, client=found.client.shelving(self.shelf))
        return found


def read_spec(data: bytes, run: str) -> RunSpec:
    """The spec that came with a question of `run`. Raises SpecError, PayloadError."""
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise PayloadError(f"not a spec: {error}") from None
    if not isinstance(raw, dict) or "data" in raw:
        raise PayloadError("not a spec: a JSON object without [data] is one, because a site names its data itself")
    spec = RunSpec.check(raw, where="the server's spec")
    if spec.run.name != run:
        raise SpecError(f'a question of run "{run}" came with the spec of run "{spec.run.name}"')
    recipe_of(spec)
    return spec


def _of_model(spec: RunSpec) -> tuple[object, ...]:
    """What decides about model, data and the start of a run."""
    return spec.model, spec.adapter, spec.recipe, spec.run.seed


def _identity(spec: RunSpec, asked: Assignment) -> bytes:
    """One piece of training: whoever is asked for it again may go on with it."""
    whole = hashlib.sha256(spec.to_json().encode() + digest(asked.payload))
    whole.update(f"{asked.run}|{asked.round}|{asked.node}|{asked.version}".encode())
    return whole.digest()


def _result(
    question: pb.Question, *, payload: bytes = b"", weight: float = 0.0, metrics: Mapping[str, float] | None = None
) -> pb.Result:
    return pb.Result(question=question.id, weight=weight, metrics=metrics or {}, payload=link.blob(payload))
