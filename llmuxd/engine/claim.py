"""An engine's address, before it starts: whose it is. What a dead engine has left there is removed."""

from __future__ import annotations

import asyncio

from llmuxd.core.events import FailureKind
from llmuxd.engine.errors import EngineError
from llmuxd.engine.spec import Endpoint, make_private_folder

_TIMEOUT_SECS = 1.0


async def claim(endpoint: Endpoint) -> None:
    """Remove a socket that a dead engine left. Raises EngineError if a living process has the address."""
    uds, port = endpoint.uds, endpoint.port
    try:
        if uds is not None:
            make_private_folder(uds.parent)
            connecting = asyncio.open_unix_connection(str(uds))
        else:
            connecting = asyncio.open_connection("127.0.0.1", port)
        _, writer = await asyncio.wait_for(connecting, _TIMEOUT_SECS)
    except (ConnectionRefusedError, FileNotFoundError):
        if uds is not None:
            uds.unlink(missing_ok=True)
    except asyncio.TimeoutError:
        raise _taken(endpoint) from None
    except OSError as error:
        raise EngineError(FailureKind.SPAWN, f"{endpoint}: {error}") from error
    else:
        writer.close()
        raise _taken(endpoint)


def _taken(endpoint: Endpoint) -> EngineError:
    return EngineError(FailureKind.SPAWN, f"another process already listens on {endpoint}")
