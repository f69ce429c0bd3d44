"""Why a request is refused. Over HTTP it is a status; where the request was already accepted, a failure of category "user"."""

from __future__ import annotations


class RequestRefused(Exception):
    """A request cannot be carried out, by a fault of its own."""

    status = 400


class NotFound(RequestRefused):
    """A request names a session, model, sampler, request or checkpoint that is not there."""

    status = 404


class SessionFinished(RequestRefused):
    """A session was finished by its client, and takes no more requests."""

    status = 410
