"""Every exception tailserve raises on purpose.

TailserveError
├── ConfigError            the configuration cannot work; names the field and the remedy
├── UnsupportedModelError  the model cannot run in packed batches
├── InvalidRequestError    the client must change the request (HTTP 400)
│   └── BodyTooLargeError  (413)
├── AuthenticationError    no API key, or an unknown one (401)
├── ForbiddenError         the key's tenant may not do this (403)
├── NotFoundError          no such model or request (404)
├── QueueFullError         the class is saturated, or a tenant's limit reached (429); carries when to try again
├── NotReadyError          nothing can serve the request yet (503); carries when to try again
├── ExecutorLostError      the process that runs the model died or hung; the engine recovers
└── InternalError          tailserve's own fault (500)
"""

from __future__ import annotations


class TailserveError(Exception):
    """Base class. `param` names the offending field where there is one, `code` is stable for programs to test."""

    code = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments do not survive Exception's own pickling, and these cross Serve handles and sockets.
        return (rebuild, (type(self), self.message, self.__dict__))


def rebuild(cls: type[TailserveError], message: str, state: dict[str, object]) -> TailserveError:
    """An error as it was, from its class, its message and its attributes."""
    error = cls.__new__(cls)
    Exception.__init__(error, message)
    error.__dict__.update(state)
    return error


class ConfigError(TailserveError):
    code = "invalid_config"


class UnsupportedModelError(TailserveError):
    code = "unsupported_model"


class InvalidRequestError(TailserveError):
    code = "invalid_request"


class BodyTooLargeError(InvalidRequestError):
    code = "body_too_large"


class AuthenticationError(TailserveError):
    code = "invalid_api_key"


class ForbiddenError(TailserveError):
    code = "class_not_allowed"


class NotFoundError(TailserveError):
    code = "not_found"


class QueueFullError(TailserveError):
    code = "queue_full"

    def __init__(self, message: str, *, retry_after_s: float, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param=param, code=code)
        self.retry_after_s = retry_after_s


class NotReadyError(TailserveError):
    code = "not_ready"

    def __init__(self, message: str, *, retry_after_s: float = 5.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ExecutorLostError(TailserveError):
    code = "executor_lost"


class InternalError(TailserveError):
    code = "internal_error"
