"""Connections: an answer is read whole in every form, is never another request's, and nothing is sent elsewhere."""

import base64
import shutil
import socket
import ssl
import subprocess
import threading
from contextlib import contextmanager

import pytest

from copa_harness.lm.endpoint import transport
from copa_harness.lm.endpoint.transport import Connections, NotConnectedError

USUAL = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-A: b \r\n\r\nhello"
OTHER = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nother"
END = "the server ends the connection"
DEAF = "the server ends the connection once a request is there"


def received(connection):
    """A whole request."""
    data = b""
    while b"\r\n\r\n" not in data or len(data) < len(data.partition(b"\r\n\r\n")[0]) + 4 + _length(data):
        piece = connection.recv(65536)
        if not piece:
            return data
        data += piece
    return data


def _length(data):
    head = data.lower().partition(b"\r\n\r\n")[0]
    return int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)


@contextmanager
def serving(*answers, tls=None):
    """A server that gives these answers, each a list of pieces, one after another. Yields (url, requests)."""
    heads = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(5)

        def accepted():
            connection, _ = listener.accept()
            connection.settimeout(5)
            return connection if tls is None else tls.wrap_socket(connection, server_side=True)

        def serve():
            try:
                connection = accepted()
                for pieces in answers:
                    if pieces is not END:
                        heads.append(received(connection))
                    if pieces in (END, DEAF):
                        connection.close()
                        connection = accepted()
                        continue
                    for piece in pieces:
                        connection.sendall(piece)
                        threading.Event().wait(0.01)
                connection.close()
            except OSError:
                listener.close()  # the client did not come, or left: its test says why

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http{'' if tls is None else 's'}://127.0.0.1:{listener.getsockname()[1]}/v1?a=b", heads
        thread.join(6)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in transport._ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def connections():
    made = Connections(largest_body=1000)
    yield made
    made.close()


def ask(connections, url, headers=(), limit_s=3.0):
    return connections.send("POST", url, headers=list(headers), body=b"{}", limit_s=limit_s)


@pytest.mark.parametrize(
    "pieces",
    [
        [USUAL],
        [USUAL[:20], USUAL[20:50], USUAL[50:]],
        [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"2\r\nhe\r\n", b"3\r\nllo\r\n0\r\n\r\n"],
        [b"HTTP/1.1 100 Continue\r\n\r\n" + USUAL],
        [b"HTTP/1.1 102 Processing\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nLink: <a>\r\n\r\n", USUAL],
        [b"HTTP/1.1 103 Early Hints\r\nContent-Length: 9\r\n\r\n" + USUAL],
        [b"HTTP/1.0 200 OK\r\n\r\nhello"],
        [b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello"],
    ],
    ids=["at once", "in pieces", "chunked", "continued", "interim", "interim at once", "until the end", "closing"],
)
def test_an_answer_is_read_whole_in_every_form(connections, pieces):
    with serving(pieces) as (url, heads):
        status, _, _, body = ask(connections, url, [("X-Key", "k")])
    assert (status, body) == (200, b"hello")
    assert heads[0].startswith(b"POST /v1?a=b HTTP/1.1\r\n")
    assert b"\r\nX-Key: k\r\n" in heads[0]
    assert heads[0].endswith(b"\r\n\r\n{}")


def test_headers_are_read_without_the_space_around_them(connections):
    with serving([USUAL]) as (url, _):
        assert ask(connections, url)[2] == [("Content-Length", "5"), ("X-A", "b")]


def test_a_connection_is_used_again_until_the_server_closes_it(connections):
    with serving([USUAL], [USUAL], END, [USUAL]) as (url, heads):
        assert ask(connections, url)[3] == ask(connections, url)[3]
        threading.Event().wait(0.1)  # the server has closed it meanwhile
        assert ask(connections, url)[0] == 200
    assert len(heads) == 3


@pytest.mark.parametrize("cut", [1, 10, 14, 20, 38, 40, 46])
def test_a_head_that_is_cut_off_is_no_answer(connections, cut):
    assert b"\r\n\r\n" not in USUAL[:cut]
    with serving([USUAL[:cut]]) as (url, _), pytest.raises(OSError, match=r"cut off|BadStatusLine"):
        ask(connections, url)


@pytest.mark.parametrize(
    "stray",
    [[USUAL + OTHER], [USUAL, OTHER], [USUAL + OTHER[:20], OTHER[20:]], [USUAL + b"x"], [USUAL + b"\r\n"]],
    ids=["at once", "later", "in halves", "one byte", "a line"],
)
def test_what_a_server_sends_unasked_is_never_the_answer_of_the_next_request(connections, stray):
    interim = b"HTTP/1.1 102 Processing\r\n\r\n"
    with serving(stray, END, [interim, USUAL]) as (url, heads):
        assert ask(connections, url)[3] == b"hello"
        threading.Event().wait(0.1)
        assert ask(connections, url)[3] == b"hello"
    assert len(heads) == 2


def test_a_used_connection_that_dies_without_a_byte_is_replaced_once(connections):
    with serving([USUAL], DEAF, [OTHER], DEAF, DEAF, [USUAL]) as (url, heads):
        assert ask(connections, url)[3] == b"hello"
        assert ask(connections, url)[3] == b"other"
        with pytest.raises(OSError, match="RemoteDisconnected"):
            ask(connections, url)  # a new connection, dead as well: it may have been paid
        assert ask(connections, url)[3] == b"hello"
    assert len(heads) == 6


def test_a_used_connection_that_dies_in_the_middle_of_an_answer_is_not_tried_again(connections):
    with serving([USUAL], [USUAL[:30]], END, [USUAL]) as (url, heads):
        ask(connections, url)
        with pytest.raises(OSError, match="head of the answer was cut off"):
            ask(connections, url)
        assert len(heads) == 2
        ask(connections, url)


def test_a_new_connection_that_brings_nothing_is_not_tried_again(connections):
    with serving(DEAF, [USUAL]) as (url, heads):
        with pytest.raises(OSError, match="RemoteDisconnected"):
            ask(connections, url)
        assert len(heads) == 1
        ask(connections, url)


def test_a_fork_does_not_speak_over_its_parents_connections(connections, monkeypatch):
    with serving([USUAL], END, [USUAL]) as (url, _):
        ask(connections, url)
        before = list(connections._pools.values())
        monkeypatch.setattr(transport, "fork_count", lambda: -1)
        ask(connections, url)
        assert list(connections._pools.values()) != before


def test_a_body_that_is_too_long_or_cut_is_no_answer(connections):
    long = [b"HTTP/1.1 200 OK\r\nContent-Length: 2000\r\n\r\n" + b"x" * 2000]
    with serving(long) as (url, _), pytest.raises(OSError, match="exceeds 1,000 bytes"):
        ask(connections, url)
    with serving([USUAL[:-2]]) as (url, _), pytest.raises(OSError, match="IncompleteRead"):
        ask(connections, url)
    with (
        serving([b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\nhello"]) as (url, _),
        pytest.raises(OSError, match="got the Content-Length 'x'"),
    ):
        ask(connections, url)


@pytest.mark.parametrize(
    "pieces",
    [
        [USUAL[:-2], *[b""] * 60],
        [USUAL[:20], *[b"x"] * 60],
        [b"HTTP/1.1 102 Processing\r\n\r\n"] * 60,
        [USUAL[:-5], *[b"h"] * 4, *[b""] * 60],
    ],
    ids=["silence", "a dripping head", "interim answers for ever", "a dripping body"],
)
def test_a_deadline_ends_the_wait_for_the_rest(connections, pieces):
    with serving(pieces) as (url, _), pytest.raises(TimeoutError):
        ask(connections, url, limit_s=0.2)


def test_nobody_listening_means_nothing_was_sent(connections):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(NotConnectedError, match=f"no connection to 127.0.0.1:{port}: .*refused"):
        ask(connections, f"http://127.0.0.1:{port}/")


@pytest.mark.parametrize("url", ["http:///v1", "http://[::1/", "http://127.0.0.1:port/", "ftp://127.0.0.1/", "//a/b"])
def test_a_url_that_leads_nowhere_sends_nothing(connections, url):
    with pytest.raises(NotConnectedError, match="no connection"):
        ask(connections, url)


def test_what_http_has_no_letters_for_is_not_sent(connections):
    with serving([USUAL]) as (url, heads):
        with pytest.raises(NotConnectedError, match="cannot be sent"):
            ask(connections, url, [("X-A", "\u20ac")])
        assert ask(connections, url)[3] == b"hello"
    assert len(heads) == 1


def test_a_protocol_nobody_asked_for_is_no_answer(connections):
    with serving([b"HTTP/1.1 101 Switching Protocols\r\n\r\n"], END, [USUAL]) as (url, _):
        with pytest.raises(OSError, match="got the status 101"):
            ask(connections, url)
        assert ask(connections, url)[3] == b"hello"


@pytest.mark.parametrize("value", ["a\r\nX-Evil: 1", "a\nb", "a\x00b", "a\n b"])
def test_a_header_cannot_smuggle_in_another(connections, value):
    with pytest.raises(NotConnectedError, match="control character"):
        ask(connections, "http://127.0.0.1:9/", [("X-A", value)])


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_an_answer_and_is_not_followed(connections, status):
    with serving() as (elsewhere, heads):
        moved = f"HTTP/1.1 {status} Moved\r\nLocation: {elsewhere}\r\nContent-Length: 0\r\n\r\n".encode()
        with serving([moved]) as (url, _):
            assert ask(connections, url, [("Authorization", "Bearer k")])[0] == status
        socket.create_connection(("127.0.0.1", int(elsewhere.split(":")[2].split("/")[0]))).close()
    assert heads == []


def basic(text):
    return b"Basic " + base64.b64encode(text.encode())


def test_a_user_in_the_url_is_sent_as_authorization(connections):
    with serving([USUAL]) as (url, heads):
        ask(connections, url.replace("://", "://me:p%40ss@"), [("authorization", "Bearer k")])
    assert heads[0].startswith(b"POST /v1?a=b HTTP/1.1\r\n")
    assert basic("me:p@ss") in heads[0]
    assert b"Bearer" not in heads[0]
    assert b"p%40ss" not in heads[0]


@pytest.mark.parametrize("name", ["http_proxy", "ALL_PROXY"])
def test_a_proxy_of_the_environment_is_asked_unless_no_proxy_excepts_the_server(connections, monkeypatch, name):
    with serving([USUAL]) as (proxy, asked):
        monkeypatch.setenv(name, proxy.replace("://", "://me:pw@"))
        assert ask(connections, "http://models.invalid/v1")[3] == b"hello"
    assert asked[0].startswith(b"POST http://models.invalid/v1 HTTP/1.1\r\n")
    assert basic("me:pw") in asked[0]
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving([USUAL]) as (url, heads):
        assert ask(connections, url)[3] == b"hello"
    assert heads[0].startswith(b"POST /v1?a=b ")


def test_a_proxy_that_is_not_there_or_not_one_of_ours_sends_nothing(connections, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://me:secret@127.0.0.1:1")
    with pytest.raises(NotConnectedError, match=r"no connection to 127\.0\.0\.1:1: .*refused") as caught:
        ask(connections, "http://models.invalid/v1")
    assert "secret" not in str(caught.value)
    monkeypatch.setenv("http_proxy", "socks5://127.0.0.1:1")
    with pytest.raises(NotConnectedError, match="a proxy of the kind socks5://, expected http://"):
        ask(connections, "http://models.invalid/v1")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    place = tmp_path_factory.mktemp("tls")
    request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    request += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "certificate.pem"]
    subprocess.run(request, cwd=place, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(place / "certificate.pem", place / "key.pem")
    return place / "certificate.pem", context


@pytest.mark.parametrize("name", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_certificates_the_environment_names_are_trusted_and_no_others(connections, monkeypatch, certificate, name):
    file, context = certificate
    with serving([USUAL], tls=context) as (url, heads), pytest.raises(NotConnectedError, match="certificate verify"):
        ask(connections, url)
    assert heads == []
    monkeypatch.setenv(name, str(file))
    with serving([USUAL], [OTHER], tls=context) as (url, heads):
        assert (ask(connections, url)[3], ask(connections, url)[3]) == (b"hello", b"other")
    assert len(heads) == 2


def test_certificates_that_cannot_be_read_are_told(connections, monkeypatch, tmp_path):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "none.pem"))
    with pytest.raises(NotConnectedError, match="certificates that REQUESTS_CA_BUNDLE names"):
        ask(connections, "https://127.0.0.1:9/")


def test_tls_goes_through_a_proxy_as_a_tunnel(connections, monkeypatch, certificate):
    file, context = certificate
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        proxy.settimeout(5)

        def tunnel():
            connection, _ = proxy.accept()
            connection.settimeout(5)
            asked.append(received(connection))
            connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            with context.wrap_socket(connection, server_side=True) as inside:
                asked.append(received(inside))
                inside.sendall(USUAL)

        thread = threading.Thread(target=tunnel)
        thread.start()
        monkeypatch.setenv("https_proxy", f"http://me:pw@127.0.0.1:{proxy.getsockname()[1]}")
        assert ask(connections, "https://127.0.0.1:44444/v1", [("Authorization", "Bearer k")])[3] == b"hello"
        thread.join(5)
    assert asked[0].startswith(b"CONNECT 127.0.0.1:44444 ")
    assert basic("me:pw") in asked[0]
    assert b"Bearer" not in asked[0]
    assert asked[1].startswith(b"POST /v1 ")
    assert b"Basic" not in asked[1]
