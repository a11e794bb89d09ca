"""A web server on 127.0.0.1 for a folder: serves ranges, cuts when told, keeps a log."""

import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        start = (
            int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if "Range" in self.headers
            else 0
        )
        server.log.append((self.path, start))
        path = server.folder / self.path[1:]
        if server.failures or not path.is_file():
            server.failures -= bool(server.failures)
            return self.send_error(503 if path.is_file() else 404)
        content = path.read_bytes()
        if start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.end_headers()
            return None
        start = start if server.resumes else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if server.cuts:  # this many connections break after a third of what is left
            server.cuts -= 1
            content = content[: start + (len(content) - start) // 3]
        self.wfile.write(content[start:])
        return None

    def log_message(self, *args):
        pass


@contextmanager
def serve(folder: Path):
    """server.url, server.log [(path, first byte)], server.cuts, server.failures, server.resumes."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.folder, server.log, server.cuts, server.failures, server.resumes = folder, [], 0, 0, True
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
