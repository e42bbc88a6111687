"S3 with faults: a proxy before moto's server that injects the errors a test asks for, in S3's own format."

import http.client
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


def error(code, status=400, **more):  # as S3 says it
    body = ''.join(
        f'<{k}>{v}</{k}>' for k, v in dict(Code=code, Message=f'{code} it is', RequestId='1', **more).items()
    )
    return (
        status,
        {'Content-Type': 'application/xml'},
        f'<?xml version="1.0" encoding="UTF-8"?>\n<Error>{body}</Error>'.encode(),
    )


class Proxy(ThreadingHTTPServer):
    """`fault(method, path, n)` -> None (pass it on), (status, headers, body), or 'cut': the line breaks
    after half of the request."""

    daemon_threads = True

    def __init__(self, behind: str):
        super().__init__(('127.0.0.1', 0), Handler)
        self.behind, self.fault, self.pause, self.seen, self.done, self.url = (
            urlsplit(behind),
            None,
            0.0,
            [],
            [],
            f'http://127.0.0.1:{self.server_port}',
        )
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *_):
        pass  # clients of these tests hang up

    def count(self, what):
        return sum(what in line for line in self.seen)


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *_):
        pass

    def cut(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def answer(self, status, headers, body):
        self.send_response(status)
        for k, v in {**headers, 'Content-Length': headers.get('Content-Length', len(body))}.items():
            self.send_header(k, v)
        self.end_headers()
        if self.command != 'HEAD':
            self.slowly(lambda i: self.wfile.write(body[i : i + 65536]), len(body))

    def slowly(self, move, size):
        for i in range(0, size, 65536):
            move(i)
            time.sleep(self.server.pause)

    def go(self):
        s, size, parts = self.server, int(self.headers.get('Content-Length', 0)), []
        s.seen.append(f'{self.command} {self.path}')
        fault = s.fault(self.command, self.path, len(s.seen)) if s.fault else None
        if fault == 'cut':
            self.rfile.read(size // 2)
            return self.cut()
        self.slowly(lambda i: parts.append(self.rfile.read(min(65536, size - i))), size)
        if fault and self.command in ('GET', 'PUT', 'POST', 'DELETE', 'HEAD') and fault[0] != 'half':
            return self.answer(*fault)
        c = http.client.HTTPConnection(s.behind.hostname, s.behind.port)
        c.request(self.command, self.path, b''.join(parts), dict(self.headers))
        r = c.getresponse()
        body = r.read()
        keep = {
            k: v
            for k, v in r.getheaders()
            if k.lower() not in ('connection', 'transfer-encoding', 'date', 'server')
        }
        if fault:
            self.answer(r.status, keep, body[: len(body) // 2])
            return self.cut()  # ('half',): the line breaks after half of the answer
        s.done.append(f'{self.command} {self.path}')
        self.answer(r.status, keep, body)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = go
