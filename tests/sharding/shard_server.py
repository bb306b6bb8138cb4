"""A real HTTP server on this machine that serves token shards, and fails as servers do when it is told to."""

import threading
from collections import Counter
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class ShardServer(ThreadingHTTPServer):
    """Serves a folder; `faults[shard number]` is a list of what its next answers are instead: 503, 404, "stall" (half of the
    bytes, then nothing), "cut" (half of the bytes), "corrupt" (one byte differs). "always ..." stays.
    """

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), lambda *arguments: Handler(*arguments, directory=str(folder)))
        self.folder, self.faults, self.requests, self.released = folder, {}, Counter(), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def next_fault(self, shard: int):
        faults = self.faults.get(shard, [])
        if faults and str(faults[0]).startswith("always "):
            return faults[0].removeprefix("always ")
        return str(faults.pop(0)) if faults else ""

    def end(self) -> None:
        self.released.set()
        self.shutdown()
        self.server_close()


class Handler(SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        shard = int(Path(self.path).stem)
        self.server.requests[shard] += 1
        fault = self.server.next_fault(shard)
        if fault.isdecimal():
            return self.send_error(int(fault))
        data = Path(self.translate_path(self.path)).read_bytes()
        whole = len(data)
        if fault == "corrupt":
            data = data[: whole // 2] + bytes([data[whole // 2] ^ 1]) + data[whole // 2 + 1 :]
        if fault in ("stall", "cut"):
            data = data[: whole // 2]
        self.send_response(200)
        self.send_header("Content-Length", str(len(data) if fault == "cut" else whole))
        self.end_headers()
        self.wfile.write(data)
        if fault == "stall":
            self.wfile.flush()
            self.server.released.wait(60)

    def log_message(self, *_) -> None:
        pass
