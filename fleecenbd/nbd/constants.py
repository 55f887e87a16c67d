"""Names and numbers of the NBD protocol, spelled as its specification spells them.

Source: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md, and its branch
extension-ext-header for extended headers. The few names that are our own begin with FLEECENBD_;
limits say where they come from.
"""

from __future__ import annotations

from typing import Final

MIB: Final = 1 << 20

# Magic numbers
NBD_MAGIC: Final = 0x4E42444D41474943
"""NBDMAGIC."""
NBD_OPTS_MAGIC: Final = 0x49484156454F5054
"""IHAVEOPT."""
NBD_REP_MAGIC: Final = 0x0003E889045565A9
NBD_REQUEST_MAGIC: Final = 0x25609513
NBD_SIMPLE_REPLY_MAGIC: Final = 0x67446698
NBD_STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF
NBD_EXTENDED_REQUEST_MAGIC: Final = 0x21E41C71
NBD_EXTENDED_REPLY_MAGIC: Final = 0x6E8A278C

# Handshake flags (16 bits, from the server) and client flags (32 bits)
NBD_FLAG_FIXED_NEWSTYLE: Final = 1 << 0
NBD_FLAG_NO_ZEROES: Final = 1 << 1
NBD_FLAG_C_FIXED_NEWSTYLE: Final = 1 << 0
NBD_FLAG_C_NO_ZEROES: Final = 1 << 1

# Transmission flags (16 bits)
NBD_FLAG_HAS_FLAGS: Final = 1 << 0
NBD_FLAG_READ_ONLY: Final = 1 << 1
NBD_FLAG_SEND_FLUSH: Final = 1 << 2
NBD_FLAG_SEND_FUA: Final = 1 << 3
NBD_FLAG_ROTATIONAL: Final = 1 << 4
NBD_FLAG_SEND_TRIM: Final = 1 << 5
NBD_FLAG_SEND_WRITE_ZEROES: Final = 1 << 6
NBD_FLAG_SEND_DF: Final = 1 << 7
NBD_FLAG_CAN_MULTI_CONN: Final = 1 << 8
NBD_FLAG_SEND_RESIZE: Final = 1 << 9
NBD_FLAG_SEND_CACHE: Final = 1 << 10
NBD_FLAG_SEND_FAST_ZERO: Final = 1 << 11
NBD_FLAG_BLOCK_STATUS_PAYLOAD: Final = 1 << 12

# Options
NBD_OPT_EXPORT_NAME: Final = 1
NBD_OPT_ABORT: Final = 2
NBD_OPT_LIST: Final = 3
NBD_OPT_PEEK_EXPORT: Final = 4
NBD_OPT_STARTTLS: Final = 5
NBD_OPT_INFO: Final = 6
NBD_OPT_GO: Final = 7
NBD_OPT_STRUCTURED_REPLY: Final = 8
NBD_OPT_LIST_META_CONTEXT: Final = 9
NBD_OPT_SET_META_CONTEXT: Final = 10
NBD_OPT_EXTENDED_HEADERS: Final = 11

# Option replies
NBD_REP_ACK: Final = 1
NBD_REP_SERVER: Final = 2
NBD_REP_INFO: Final = 3
NBD_REP_META_CONTEXT: Final = 4
NBD_REP_FLAG_ERROR: Final = 1 << 31
NBD_REP_ERR_UNSUP: Final = NBD_REP_FLAG_ERROR + 1
NBD_REP_ERR_POLICY: Final = NBD_REP_FLAG_ERROR + 2
NBD_REP_ERR_INVALID: Final = NBD_REP_FLAG_ERROR + 3
NBD_REP_ERR_PLATFORM: Final = NBD_REP_FLAG_ERROR + 4
NBD_REP_ERR_TLS_REQD: Final = NBD_REP_FLAG_ERROR + 5
NBD_REP_ERR_UNKNOWN: Final = NBD_REP_FLAG_ERROR + 6
NBD_REP_ERR_SHUTDOWN: Final = NBD_REP_FLAG_ERROR + 7
NBD_REP_ERR_BLOCK_SIZE_REQD: Final = NBD_REP_FLAG_ERROR + 8
NBD_REP_ERR_TOO_BIG: Final = NBD_REP_FLAG_ERROR + 9
NBD_REP_ERR_EXT_HEADER_REQD: Final = NBD_REP_FLAG_ERROR + 10

# Information types of NBD_REP_INFO
NBD_INFO_EXPORT: Final = 0
NBD_INFO_NAME: Final = 1
NBD_INFO_DESCRIPTION: Final = 2
NBD_INFO_BLOCK_SIZE: Final = 3

# Commands
NBD_CMD_READ: Final = 0
NBD_CMD_WRITE: Final = 1
NBD_CMD_DISC: Final = 2
NBD_CMD_FLUSH: Final = 3
NBD_CMD_TRIM: Final = 4
NBD_CMD_CACHE: Final = 5
NBD_CMD_WRITE_ZEROES: Final = 6
NBD_CMD_BLOCK_STATUS: Final = 7
NBD_CMD_RESIZE: Final = 8

# Command flags (16 bits)
NBD_CMD_FLAG_FUA: Final = 1 << 0
NBD_CMD_FLAG_NO_HOLE: Final = 1 << 1
NBD_CMD_FLAG_DF: Final = 1 << 2
NBD_CMD_FLAG_REQ_ONE: Final = 1 << 3
NBD_CMD_FLAG_FAST_ZERO: Final = 1 << 4
NBD_CMD_FLAG_PAYLOAD_LEN: Final = 1 << 5
FLEECENBD_CMD_FLAG_READ_ONCE: Final = 1 << 15
"""Reserved for a private extension of NBD_CMD_READ; nothing agrees to it yet: NBD_EINVAL."""

# Structured reply flags and types
NBD_REPLY_FLAG_DONE: Final = 1 << 0
NBD_REPLY_TYPE_NONE: Final = 0
NBD_REPLY_TYPE_OFFSET_DATA: Final = 1
NBD_REPLY_TYPE_OFFSET_HOLE: Final = 2
NBD_REPLY_TYPE_BLOCK_STATUS: Final = 5
NBD_REPLY_TYPE_BLOCK_STATUS_EXT: Final = 6
NBD_REPLY_TYPE_ERROR: Final = (1 << 15) + 1
NBD_REPLY_TYPE_ERROR_OFFSET: Final = (1 << 15) + 2

# Flags of the base:allocation context
NBD_STATE_HOLE: Final = 1 << 0
NBD_STATE_ZERO: Final = 1 << 1

# Errors: the only values that may go on the wire
NBD_EPERM: Final = 1
NBD_EIO: Final = 5
NBD_ENOMEM: Final = 12
NBD_EINVAL: Final = 22
NBD_ENOSPC: Final = 28
NBD_EOVERFLOW: Final = 75
NBD_ENOTSUP: Final = 95
NBD_ESHUTDOWN: Final = 108

# Limits
NBD_STRING_MAX: Final = 4096
"""Bytes of any string (specification, "Conventions")."""
PAYLOAD_ADVERTISED: Final = 32 * MIB
"""Maximum payload that NBD_INFO_BLOCK_SIZE names; also the longest data chunk that is sent."""
PAYLOAD_MAX: Final = 64 * MIB
"""Longest payload that is taken, and READ that is answered: libnbd's own limit. A longer
payload drops the connection; the specification calls nothing up to 32 MiB an attack."""
ERROR_TEXT_MAX: Final = 900
"""Bytes of an error message: QEMU's client drops the connection over a chunk of 1000 that
is not data."""
EXTENTS_MAX: Final = 128 * 1024
"""Extents per block status chunk, as QEMU has it; the specification allows 2^20."""
EXTENT_LENGTH_MAX: Final = (1 << 32) - 64 * 1024
"""Bytes of one extent in a reply with 32-bit lengths; a multiple of 64 KiB, so that what
follows it is aligned."""
CONTEXT_FILTER_MAX: Final = 8 + 4 * 256
"""Bytes of a NBD_CMD_BLOCK_STATUS payload that are kept: the effect length, 256 contexts."""
