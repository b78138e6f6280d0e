"""This node's address for other nodes, and free ports."""

from __future__ import annotations

import fcntl
import os
import socket
import struct

from pipeline.errors import UserError

_SIOCGIFADDR = 0x8915
_ELSEWHERE = ("192.0.2.1", 9)
"""An address of RFC 5737, which nobody has: nothing is sent to it, the kernel only says which way it would go."""


def node_address(interface: str | None = None) -> str:
    """The IPv4 address under which other nodes reach this one: the interface's, or else that of the default route.

    A node's name is not asked for: on many machines it stands for 127.0.0.1 in /etc/hosts.
    Raises UserError when the interface is not there or has no address.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        if interface is not None:
            try:
                request = struct.pack("256s", os.fsencode(interface)[:15])
                return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24])
            except OSError as error:
                names = ", ".join(name for _, name in socket.if_nameindex())
                raise UserError(
                    f"cluster.interface: {interface} has no IPv4 address on {os.uname().nodename} ({error.strerror}); "
                    f"its interfaces are {names}"
                ) from None
        try:
            probe.connect(_ELSEWHERE)
        except OSError:  # no route but to itself
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def free_port(address: str = "127.0.0.1", wanted: int = 0) -> int:
    """A port of `address` that can be bound now: `wanted`, or any when that is 0. OSError when it is taken."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((address, wanted))
        return int(probe.getsockname()[1])
