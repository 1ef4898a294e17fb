"""Blocking connections: an answer is read whole in every form, and a connection is used again if it may be."""

import http.client
import socket
import threading
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest

from copa_harness.lm.endpoint.transport import Connections, NotConnectedError

USUAL = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-A: b \r\n\r\nhello"


@contextmanager
def serving(*answers):
    """A server that gives these answers, each a list of pieces; None ends the connection. Yields (url, heads)."""
    heads = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(5)

        def serve():
            connection, _ = listener.accept()
            connection.settimeout(5)
            for pieces in answers:
                if pieces is None:
                    connection.close()
                    connection, _ = listener.accept()
                    continue
                heads.append(connection.recv(65536))
                for piece in pieces:
                    connection.sendall(piece)
                    threading.Event().wait(0.01)
            connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        yield urlsplit(f"http://127.0.0.1:{listener.getsockname()[1]}/v1?a=b"), heads
        thread.join(5)


@pytest.fixture
def connections():
    made = Connections(connect_timeout_s=2.0, largest_body=1000)
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
        [b"HTTP/1.0 200 OK\r\n\r\nhello"],
        [b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello"],
    ],
    ids=["at once", "in pieces", "chunked", "continued", "until the end", "closing"],
)
def test_an_answer_is_read_whole_in_every_form(connections, pieces):
    with serving(pieces) as (url, heads):
        status, _, _, body = ask(connections, url, [("X-Key", "k")])
    assert (status, body) == (200, b"hello")
    assert heads[0].startswith(b"POST /v1?a=b HTTP/1.1\r\nX-Key: k\r\n")
    assert heads[0].endswith(b"content-length: 2\r\n\r\n{}")


def test_headers_are_read_without_the_space_around_them(connections):
    with serving([USUAL]) as (url, _):
        assert ask(connections, url)[2] == [("Content-Length", "5"), ("X-A", "b")]


def test_a_connection_is_used_again_until_the_server_closes_it(connections, monkeypatch):
    with serving([USUAL], [USUAL], None, [USUAL]) as (url, heads):
        assert ask(connections, url)[3] == ask(connections, url)[3]
        monkeypatch.setattr("copa_harness.lm.endpoint.transport.TRUSTED_S", 0.0)
        threading.Event().wait(0.1)  # the server has closed it meanwhile
        assert ask(connections, url)[0] == 200
    assert len(heads) == 3


def test_a_body_that_is_too_long_or_cut_is_no_answer(connections):
    long = [b"HTTP/1.1 200 OK\r\nContent-Length: 2000\r\n\r\n" + b"x" * 2000]
    with serving(long) as (url, _), pytest.raises(http.client.HTTPException, match="exceeds 1,000 bytes"):
        ask(connections, url)
    with serving([USUAL[:-2]]) as (url, _), pytest.raises(http.client.IncompleteRead):
        ask(connections, url)


def test_a_deadline_ends_the_wait_for_the_rest(connections):
    with serving([USUAL[:-2], *[b""] * 60]) as (url, _), pytest.raises(TimeoutError):
        ask(connections, url, limit_s=0.2)


def test_nobody_listening_means_nothing_was_sent(connections):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = urlsplit(f"http://127.0.0.1:{free.getsockname()[1]}/")
    with pytest.raises(NotConnectedError, match="no connection"):
        ask(connections, url)


@pytest.mark.parametrize("value", ["a\r\nX-Evil: 1", "a\nb", "a\x00b"])
def test_a_header_cannot_smuggle_in_another(connections, value):
    with serving(None, [USUAL]) as (url, _):
        with pytest.raises(ValueError, match="control character"):
            ask(connections, url, [("X-A", value)])
        ask(connections, url)
