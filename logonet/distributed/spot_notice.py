"""A cloud's notice that it takes this machine away, passed on to Ray, which has no way to hear of it.

AWS: https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html (two minutes before).
GCP: https://cloud.google.com/compute/docs/instances/create-use-spot#detect-preemption (30 s before).
"""

from __future__ import annotations

import json
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import datetime

from logonet.core.errors import UserError

log = logging.getLogger(__name__)

METADATA = "http://169.254.169.254"  # of AWS and of GCP
ASK_EVERY_S = 2.0
TIMEOUT_S = 5.0
GCP_NOTICE_S = 30.0
AWS_TOKEN_S = 21600  # the longest life that AWS gives a token
Deadline = Callable[[], float | None]


def _ask(url: str, headers: dict[str, str], method: str = "GET") -> str | None:
    """What the metadata service answers; None: it has no such page."""
    request = urllib.request.Request(url, headers=headers, method=method)
    # Without the proxies of the environment: the address is the machine's own.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=TIMEOUT_S) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as err:
        if err.code in (403, 404, 405):
            return None
        raise


def _aws(base: str) -> float | None:
    """Unix time at which AWS takes the machine away; None while it does not."""
    ttl = {"X-aws-ec2-metadata-token-ttl-seconds": str(AWS_TOKEN_S)}
    token = _ask(f"{base}/latest/api/token", ttl, "PUT") or ""
    found = _ask(f"{base}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})
    return None if found is None else datetime.fromisoformat(json.loads(found)["time"]).timestamp()


def _gcp(base: str) -> float | None:
    found = _ask(f"{base}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    return time.time() + GCP_NOTICE_S if found == "TRUE" else None


def cloud(base: str = METADATA) -> Deadline:
    """What tells when this machine goes.

    Raises:
        UserError: neither AWS nor GCP answers at ``base``.
    """
    try:
        ttl = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
        if _ask(f"{base}/latest/api/token", ttl, "PUT") is not None:
            return lambda: _aws(base)
        if _ask(f"{base}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"}) is not None:
            return lambda: _gcp(base)
    except OSError as err:
        log.warning("%s: %s", base, err)
    raise UserError(
        f"neither AWS nor GCP answers at {base}, so nothing tells that this machine goes; run this on their spot "
        "machines alone, and let pods on AWS reach it (HttpPutResponseHopLimit 2)"
    )


def watch(deadline: Deadline, drain: Callable[[float], None]) -> None:
    """Ask ``deadline`` until there is one, and ``drain`` the machine by then; return when that is done."""
    import ray  # noqa: F401  # now: at a notice every second counts

    while True:
        try:
            if (until := deadline()) is not None:
                drain(until)
                return
        except (
            OSError,
            ValueError,
            KeyError,
            RuntimeError,
        ) as err:  # the service or the cluster's head may be busy
            log.warning("asked again in %g s: %s", ASK_EVERY_S, err)
        time.sleep(ASK_EVERY_S)
