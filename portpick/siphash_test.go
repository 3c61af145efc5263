package portpick

import (
	"encoding/binary"
	"encoding/hex"
	"testing"
)

// Values from the table that the authors of SipHash publish with their
// implementation (vectors.h): the key is 00 01 … 0f, the message 00 01 … of the
// length given, and the result is written as bytes, least significant first.
var sipHashVectors = []struct {
	length int
	result string
}{
	{0, "310e0edd47db6f72"},
	{1, "fd67dc93c539f874"},
	{2, "5a4fa9d909806c0d"},
	{3, "2d7efbd796666785"},
	{4, "b7877127e09427cf"},
	{5, "8da699cd64557618"},
	{6, "cee3fe586e46c9cb"},
	{7, "37d1018bf50002ab"},
	{8, "6224939a79f5f593"},
	{9, "b0e4a90bdf82009e"},
	{10, "f3b9dd94c5bb5d7a"},
	{11, "a7ad6b22462fb3f4"},
	{12, "fbe50e86bc8f1e75"},
	{13, "903d84c02756ea14"},
	{14, "eef27a8e90ca23f7"},
	{15, "e545be4961ca29a1"},
	{16, "db9bc2577fcc2a3f"},
	{17, "9447be2cf5e99a69"},
	{18, "9cd38d96f0b3c14b"},
	{24, "94af49f6c650adb8"},
	{31, "42c341d8fa92d832"},
	{32, "ce7cf2722f512771"},
}

func TestSipHashAgreesWithThePublishedVectors(t *testing.T) {
	var bytes [64]byte
	for i := range bytes {
		bytes[i] = byte(i)
	}
	key := [2]uint64{binary.LittleEndian.Uint64(bytes[:8]), binary.LittleEndian.Uint64(bytes[8:16])}
	for _, v := range sipHashVectors {
		want, err := hex.DecodeString(v.result)
		if err != nil {
			t.Fatal(err)
		}
		if got := siphash(key, bytes[:v.length]); got != binary.LittleEndian.Uint64(want) {
			t.Errorf("message of %d bytes: %#016x, want %#016x", v.length, got, binary.LittleEndian.Uint64(want))
		}
	}
}
