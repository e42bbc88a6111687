"S3 with faults: a proxy before moto's server that injects the errors a test asks for, in S3's own format."

import hashlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit


def error(code, status=400, **more):  # as S3 says it
    body = ''.join(
        f'<{k}>{v}</{k}>' for k, v in (dict(Code=code, Message=f'{code} it is', RequestId='1') | more).items()
    )
    return (
        status,
        {'Content-Type': 'application/xml'},
        f'<?xml version="1.0" encoding="UTF-8"?>\n<Error>{body}</Error>'.encode(),
    )


def certificate(folder: Path) -> Path:
    "A certificate of this machine and its key, in one file."
    from datetime import UTC, datetime, timedelta

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, 'localhost')])
    here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address('127.0.0.1'))])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    now = datetime.now(UTC)
    builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    builder = builder.add_extension(here, critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    file = folder / 'here.pem'
    file.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(pem) + secret)
    return file


def other_store(kind: str):
    """What stores other than Amazon's refuse: R2 the checksum of a part and chunks with a trailer, Google
    chunks with a trailer. Both compare the hash in the signature with the content."""

    def refuse(method, path, headers, body):
        checksum = any(
            name.lower().startswith(('x-amz-checksum-', 'x-amz-sdk-checksum-')) for name in headers
        )
        chunked = 'aws-chunked' in headers.get('Content-Encoding', '') or 'x-amz-trailer' in headers
        in_parts = 'partNumber=' in path or 'uploads' in urlsplit(path).query
        if kind == 'r2' and ((checksum and in_parts) or chunked):
            return error('NotImplemented', 501, Message='Header x-amz-checksum-sha256 is not implemented')
        if kind == 'gcs' and chunked:
            return error('SignatureDoesNotMatch', 403, Message='The signature we calculated is another')
        if method == 'PUT' and headers.get('x-amz-content-sha256') != hashlib.sha256(body).hexdigest():
            return error('XAmzContentSHA256Mismatch')

    return refuse


class Proxy(ThreadingHTTPServer):
    """`fault(method, path, n)` -> None (pass it on), (status, headers, body), or 'cut': the line breaks
    after half of the request."""

    daemon_threads = True

    def __init__(self, behind: str, pem: Path | None = None):  # a certificate: https
        super().__init__(('127.0.0.1', 0), Handler)
        self.refuse = self.damage = None  # see `other_store`; a function that changes a body on its way
        self.behind, self.fault, self.pause, self.seen, self.done, self.url = (
            urlsplit(behind),
            None,
            0.0,
            [],
            [],
            f'http{"s" if pem else ""}://127.0.0.1:{self.server_port}',
        )
        if pem:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(pem)
            self.socket = context.wrap_socket(self.socket, server_side=True)
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

    def chunks(self):
        "Yield a body of unknown size. Unread, it would break the connection before the answer arrives."
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def go(self):
        s, size, parts = self.server, int(self.headers.get('Content-Length', 0)), []
        s.seen.append(f'{self.command} {self.path}')
        fault = s.fault(self.command, self.path, len(s.seen)) if s.fault else None
        if fault == 'cut':
            self.rfile.read(size // 2)
            return self.cut()
        self.slowly(lambda i: parts.append(self.rfile.read(min(65536, size - i))), size)
        if self.headers.get('Transfer-Encoding') == 'chunked':
            parts += self.chunks()
        if fault and self.command in ('GET', 'PUT', 'POST', 'DELETE', 'HEAD') and fault[0] != 'half':
            return self.answer(*fault)
        sent = b''.join(parts)
        if s.damage:
            sent = s.damage(sent)
        if refused := s.refuse and s.refuse(self.command, self.path, self.headers, sent):
            return self.answer(*refused)
        c = http.client.HTTPConnection(s.behind.hostname, s.behind.port)
        c.request(self.command, self.path, sent, dict(self.headers))
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
