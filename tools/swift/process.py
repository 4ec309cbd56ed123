"""One process of the embedded S3 server, run by the Python of ``.venv-store``, which has Swift and nothing of ours.

python -I process.py PARENT rings FOLDER HOST NAME=PORT ...
python -I process.py PARENT (object | container | account | proxy | updater) CONF
"""

from __future__ import annotations

import ctypes
import importlib
import os
import sys


def write_rings(folder: str, host: str, *servers: str) -> None:
    from swift.common.ring import RingBuilder

    for server in servers:
        name, port = server.split("=")
        builder = RingBuilder(part_power=4, replicas=1, min_part_hours=1)
        device = {"id": 0, "region": 1, "zone": 1, "device": "d1", "weight": 1.0, "meta": "", "ip": host}
        device |= {"port": int(port), "replication_ip": host, "replication_port": int(port)}
        builder.add_dev(device)
        builder.rebalance()
        builder.get_ring().save(os.path.join(folder, f"{name}.ring.gz"))


def serve(part: str, conf: str) -> None:
    if part == "updater":
        from swift.common.utils import set_swift_dir

        set_swift_dir(os.path.dirname(conf))  # the updater ignores swift_dir in its file
        sys.argv, module = ["swift-object-updater", conf], "swift.obj.updater"
    else:
        sys.argv = [f"swift-{part}-server", conf]
        module = f"swift.{'obj' if part == 'object' else part}.server"
    importlib.import_module(module).main()


if __name__ == "__main__":
    parent, part, *rest = sys.argv[1:]
    # The kernel kills this process when the thread that started it ends, however that comes about. The parent may
    # already be gone by then, hence the second check.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
    if os.getppid() != int(parent):
        sys.exit(1)
    if part == "rings":
        write_rings(*rest)
    else:
        serve(part, *rest)
