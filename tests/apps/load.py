"""Requests over a Unix socket, from threads: as many as a site gets in some seconds."""

import http.client
import socket
import threading
import time


class Connection(http.client.HTTPConnection):
    def __init__(self, path):
        super().__init__("localhost", timeout=60)
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


def get(socket_path, url):
    """The status and the body of one request."""
    connection = Connection(socket_path)
    try:
        connection.request("GET", url)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def flood(threads, seconds, request):
    """Calls `request(thread, number)` from so many threads for so long. Returns the seconds that it took."""
    faults = []
    began = time.monotonic()

    def work(thread):
        number = 0
        try:
            while time.monotonic() < began + seconds:
                request(thread, number)
                number += 1
        except Exception as e:
            faults.append(e)

    all_of_them = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    for thread in all_of_them:
        thread.start()
    for thread in all_of_them:
        thread.join()
    if faults:
        raise faults[0]
    return time.monotonic() - began
