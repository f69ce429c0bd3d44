"""What clients have made: sessions, models in training, and samplers."""

from __future__ import annotations

import uuid
from collections import OrderedDict
from dataclasses import dataclass

from tests.tinker_service.errors import NotFound, SessionFinished
from tests.tinker_service.model import TinyModel
from tests.tinker_service.promises import Turns
from tests.tinker_service.training import TrainingRun

# An episode may go on with the sampler of an earlier step, so some are kept: each is a copy of the model.
SAMPLERS_KEPT = 64


@dataclass
class Session:
    """A client's session."""

    finished: bool = False


@dataclass(frozen=True)
class TrainedModel:
    """A model in training, and whose turn it is to change it."""

    session: Session
    run: TrainingRun
    turns: Turns


@dataclass(frozen=True)
class Sampler:
    """Weights that a client samples from. Its `number` makes its samples its own."""

    session: Session
    number: int
    model: TinyModel
    model_path: str | None


class Registry:
    """Finds things by the ids that clients send. All `Raises:` NotFound, and SessionFinished once the session is over."""

    def __init__(self) -> None:
        self._sessions: dict[str, Session] = {}
        self._models: dict[str, TrainedModel] = {}
        self._samplers: OrderedDict[str, Sampler] = OrderedDict()
        self._samplers_made = 0

    def add_session(self) -> str:
        """A new session's id, unlike any of another run of the service."""
        session_id = str(uuid.uuid4())
        self._sessions[session_id] = Session()
        return session_id

    def finish_session(self, session_id: str) -> None:
        """Take no more requests of a session. Doing it again changes nothing."""
        if session_id not in self._sessions:
            raise NotFound(f"there is no session {session_id!r}")
        self._sessions[session_id].finished = True

    def add_model(self, model_id: str, session: Session, run: TrainingRun) -> None:
        """Note a new model in training, whose request 0 is the one that made it."""
        self._models[model_id] = TrainedModel(session, run, Turns(first=1))

    def add_sampler(self, sampler_id: str, session: Session, model: TinyModel, model_path: str | None) -> None:
        """Note new weights to sample from; of more than `SAMPLERS_KEPT`, those not used for longest are forgotten."""
        self._samplers[sampler_id] = Sampler(session, self._samplers_made, model, model_path)
        self._samplers_made += 1
        if len(self._samplers) > SAMPLERS_KEPT:
            self._samplers.popitem(last=False)

    def session(self, session_id: str | None) -> Session:
        """The session with this id."""
        if session_id is None or session_id not in self._sessions:
            raise NotFound(f"there is no session {session_id!r}")
        return _live(self._sessions[session_id])

    def model(self, model_id: str) -> TrainedModel:
        """The model in training with this id."""
        if model_id not in self._models:
            raise NotFound(f"there is no model {model_id!r}")
        _live(self._models[model_id].session)
        return self._models[model_id]

    def sampler(self, sampler_id: str) -> Sampler:
        """The sampler with this id."""
        if sampler_id not in self._samplers:
            raise NotFound(f"there is no sampler {sampler_id!r}, or it has not been used for long")
        self._samplers.move_to_end(sampler_id)
        _live(self._samplers[sampler_id].session)
        return self._samplers[sampler_id]


def _live(session: Session) -> Session:
    if session.finished:
        raise SessionFinished("the session is finished")
    return session
