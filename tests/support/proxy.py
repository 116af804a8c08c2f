"""A TCP forwarder that can be told to fail: what stands between a client and a service that is down."""

import contextlib
import select
import socket
import threading


class Proxy:
    """Forwards 127.0.0.1:port to a target while `up`; refuses and cuts connections while not."""

    def __init__(self, target: tuple[str, int], idle_seconds: float | None = None) -> None:
        """idle_seconds: cut a connection that carried nothing for so long, as load balancers do."""
        self.target = target
        self.idle_seconds = idle_seconds
        self.up = True
        self.refused = 0  # connections cut while down
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._open: set[socket.socket] = set()
        self._closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    def down(self) -> None:
        """Cut everything that is open, and everything that comes."""
        self.up = False
        for one in list(self._open):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Stop for good."""
        self._closed = True
        self.down()
        self._listener.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.up:
                threading.Thread(target=self._carry, args=(client,), daemon=True).start()
            else:
                self.refused += 1
                client.close()

    def _carry(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError), socket.create_connection(self.target) as server:
            self._open |= {client, server}
            try:
                while self.up:
                    ready, _, _ = select.select([client, server], [], [], self.idle_seconds or 1.0)
                    if not ready and self.idle_seconds is not None:
                        return
                    for one in ready:
                        data = one.recv(65_536)
                        if not data:
                            return
                        (server if one is client else client).sendall(data)
            finally:
                self._open -= {client, server}
