package gate

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/pojntfx/go-nbd/pkg/protocol"
)

// Negotiation constants that go-nbd's protocol package lacks.
const (
	optionExportName = uint32(1)

	replyErrInvalid = uint32(3 | 1<<31)

	handshakeNoZeroes = uint16(1 << 1)

	exportFlagSendFlush = uint16(1 << 2)
	exportFlagSendFUA   = uint16(1 << 3)
)

// exportFlags: TRIM and WRITE_ZEROES are not advertised, so clients write data
// instead; the image is in memory, so all connections see all writes at once and
// every write is stable when it is answered.
const exportFlags = protocol.NEGOTIATION_REPLY_FLAGS_HAS_FLAGS | exportFlagSendFlush | exportFlagSendFUA |
	protocol.NEGOTIATION_REPLY_FLAGS_CAN_MULTI_CONN

const (
	// maxOptionLength bounds the data of one option: the specification bounds
	// names to 4096 bytes.
	maxOptionLength = 8 << 10
	// maxOptions bounds the options of one negotiation. QEMU sends 3.
	maxOptions = 64

	exportDescription = "compsc switchover gate"
)

// errDone says that the client ended the connection as the protocol allows.
var errDone = errors.New("the client disconnected")

// errProtocol is wrapped by errors that say that the client broke the protocol.
var errProtocol = errors.New("protocol violation")

// negotiate takes a connection to the transmission phase. It returns errDone
// when the client ends negotiation in an orderly way.
func negotiate(c io.ReadWriter) error {
	err := binary.Write(c, binary.BigEndian, protocol.NegotiationNewstyleHeader{
		OldstyleMagic:  protocol.NEGOTIATION_MAGIC_OLDSTYLE,
		OptionMagic:    protocol.NEGOTIATION_MAGIC_OPTION,
		HandshakeFlags: protocol.NEGOTIATION_HANDSHAKE_FLAG_FIXED_NEWSTYLE | handshakeNoZeroes,
	})
	if err != nil {
		return err
	}
	var flags uint32
	if err := binary.Read(c, binary.BigEndian, &flags); err != nil {
		return endOfClient(err)
	}
	const known = uint32(protocol.NEGOTIATION_HANDSHAKE_FLAG_FIXED_NEWSTYLE | handshakeNoZeroes)
	if flags&^known != 0 || flags&uint32(protocol.NEGOTIATION_HANDSHAKE_FLAG_FIXED_NEWSTYLE) == 0 {
		return fmt.Errorf("%w: client flags %#x", errProtocol, flags)
	}
	for range maxOptions {
		id, data, err := readOption(c)
		if err != nil {
			return err
		}
		switch id {
		case optionExportName:
			return exportName(c, data, flags&uint32(handshakeNoZeroes) != 0)
		case protocol.NEGOTIATION_ID_OPTION_ABORT:
			// The client may be gone already: the reply is a courtesy.
			_ = reply(c, id, protocol.NEGOTIATION_TYPE_REPLY_ACK)
			return errDone
		case protocol.NEGOTIATION_ID_OPTION_LIST:
			err = list(c, id, data)
		case protocol.NEGOTIATION_ID_OPTION_INFO, protocol.NEGOTIATION_ID_OPTION_GO:
			var accepted bool
			accepted, err = info(c, id, data)
			if err == nil && accepted && id == protocol.NEGOTIATION_ID_OPTION_GO {
				return nil
			}
		default: // TLS, structured replies, metadata contexts
			err = reply(c, id, protocol.NEGOTIATION_TYPE_REPLY_ERR_UNSUPPORTED)
		}
		if err != nil {
			return err
		}
	}
	return fmt.Errorf("%w: more than %d options", errProtocol, maxOptions)
}

// endOfClient maps the end of the stream at a message boundary to errDone.
func endOfClient(err error) error {
	if errors.Is(err, io.EOF) {
		return errDone
	}
	return err
}

func readOption(r io.Reader) (id uint32, data []byte, err error) {
	var h protocol.NegotiationOptionHeader
	if err := binary.Read(r, binary.BigEndian, &h); err != nil {
		return 0, nil, endOfClient(err)
	}
	if h.OptionMagic != protocol.NEGOTIATION_MAGIC_OPTION {
		return 0, nil, fmt.Errorf("%w: option magic %#x", errProtocol, h.OptionMagic)
	}
	if h.Length > maxOptionLength {
		return 0, nil, fmt.Errorf("%w: option %d has %d bytes", errProtocol, h.ID, h.Length)
	}
	data = make([]byte, h.Length)
	if _, err := io.ReadFull(r, data); err != nil {
		return 0, nil, fmt.Errorf("option %d: %w", h.ID, err)
	}
	return h.ID, data, nil
}

// exportName serves the old way into transmission, which has no error reply.
func exportName(w io.Writer, name []byte, noZeroes bool) error {
	if len(name) != 0 {
		return fmt.Errorf("%w: the client asks for export %q; the only one is \"\"", errProtocol, name)
	}
	b := binary.BigEndian.AppendUint64(nil, ImageSize)
	b = binary.BigEndian.AppendUint16(b, exportFlags)
	if !noZeroes {
		b = append(b, make([]byte, 124)...)
	}
	_, err := w.Write(b)
	return err
}

func list(w io.Writer, id uint32, data []byte) error {
	if len(data) != 0 {
		return reply(w, id, replyErrInvalid)
	}
	if err := reply(w, id, protocol.NEGOTIATION_TYPE_REPLY_SERVER, uint32(0)); err != nil {
		return err
	}
	return reply(w, id, protocol.NEGOTIATION_TYPE_REPLY_ACK)
}

// info answers INFO and GO; it reports whether the export was accepted.
func info(w io.Writer, id uint32, data []byte) (bool, error) {
	name, wants, ok := parseInfo(data)
	if !ok {
		return false, reply(w, id, replyErrInvalid)
	}
	if len(name) != 0 {
		return false, reply(w, id, protocol.NEGOTIATION_TYPE_REPLY_ERR_UNKNOWN)
	}
	err := reply(w, id, protocol.NEGOTIATION_TYPE_REPLY_INFO, protocol.NegotiationReplyInfo{
		Type: protocol.NEGOTIATION_TYPE_INFO_EXPORT, Size: ImageSize, TransmissionFlags: exportFlags,
	})
	for _, want := range wants {
		if err != nil {
			break
		}
		switch want {
		case protocol.NEGOTIATION_TYPE_INFO_NAME:
			err = reply(w, id, protocol.NEGOTIATION_TYPE_REPLY_INFO, protocol.NegotiationReplyNameHeader{Type: want})
		case protocol.NEGOTIATION_TYPE_INFO_DESCRIPTION:
			err = reply(w, id, protocol.NEGOTIATION_TYPE_REPLY_INFO,
				protocol.NegotiationReplyDescriptionHeader{Type: want}, []byte(exportDescription))
		case protocol.NEGOTIATION_TYPE_INFO_BLOCKSIZE:
			err = reply(w, id, protocol.NEGOTIATION_TYPE_REPLY_INFO, protocol.NegotiationReplyBlockSize{
				Type: want, MinimumBlockSize: 1, PreferredBlockSize: clusterSize, MaximumBlockSize: maxPayload,
			})
		}
	}
	if err != nil {
		return false, err
	}
	return true, reply(w, id, protocol.NEGOTIATION_TYPE_REPLY_ACK)
}

// parseInfo decodes the data of INFO and GO: name length, name, count, requests.
func parseInfo(data []byte) (name []byte, wants []uint16, ok bool) {
	be := binary.BigEndian
	if len(data) < 6 {
		return nil, nil, false
	}
	n := be.Uint32(data)
	data = data[4:]
	if uint64(n)+2 > uint64(len(data)) {
		return nil, nil, false
	}
	name, data = data[:n], data[n:]
	count := be.Uint16(data)
	data = data[2:]
	if len(data) != 2*int(count) {
		return nil, nil, false
	}
	for i := range int(count) {
		wants = append(wants, be.Uint16(data[2*i:]))
	}
	return name, wants, true
}

// reply sends one option reply with the payload's parts.
func reply(w io.Writer, option, kind uint32, parts ...any) error {
	var payload, b bytes.Buffer
	for _, p := range parts {
		if err := binary.Write(&payload, binary.BigEndian, p); err != nil {
			return err
		}
	}
	err := binary.Write(&b, binary.BigEndian, protocol.NegotiationReplyHeader{
		ReplyMagic: protocol.NEGOTIATION_MAGIC_REPLY, ID: option, Type: kind, Length: uint32(payload.Len()),
	})
	if err != nil {
		return err
	}
	b.Write(payload.Bytes())
	_, err = w.Write(b.Bytes())
	return err
}
