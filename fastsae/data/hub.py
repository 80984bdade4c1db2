"""Whether the Hugging Face hub answers: asked once and quickly, where its client would try for a minute."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request

SECONDS = 5


def why_unreachable() -> str | None:
    """Why the hub does not answer, in a few words; None if it does. Needs huggingface_hub."""
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=SECONDS).close()
    except urllib.error.HTTPError:
        return None  # an answer
    except (OSError, http.client.HTTPException) as error:
        return f"{constants.ENDPOINT}: {getattr(error, 'reason', None) or error}"
    return None
