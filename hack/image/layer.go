package main

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path"
	"strconv"
	"strings"
	"time"
)

// vfs_cap_data's revision 2 with the effective bit, and its highest
// capability (uapi/linux/capability.h).
const (
	capRevision2 = 0x02000001
	capLast      = 63
)

// writeLayer packs files into a tar archive.
func writeLayer(w io.Writer, files []File) error {
	t := tar.NewWriter(w)
	made := map[string]bool{"/": true}
	for _, f := range files {
		if !path.IsAbs(f.Path) || path.Clean(f.Path) != f.Path || f.Path == "/" {
			return fmt.Errorf("path %q: a clean absolute path below / is needed", f.Path)
		}
		if err := writeParents(t, made, f.Path); err != nil {
			return err
		}
		if made[f.Path] {
			return fmt.Errorf("path %s: twice in one layer", f.Path)
		}
		made[f.Path] = true
		if err := f.write(t); err != nil {
			return fmt.Errorf("path %s: %w", f.Path, err)
		}
	}
	return t.Close()
}

func writeParents(t *tar.Writer, made map[string]bool, file string) error {
	dir := path.Dir(file)
	if made[dir] {
		return nil
	}
	made[dir] = true
	if err := writeParents(t, made, dir); err != nil {
		return err
	}
	return File{Path: dir, Directory: true}.write(t)
}

func (f File) write(t *tar.Writer) error {
	h := &tar.Header{Name: strings.TrimPrefix(f.Path, "/"), Uid: f.UID, Gid: f.GID, ModTime: time.Unix(0, 0)}
	var body io.Reader = strings.NewReader("")
	kinds := 0
	if f.Directory {
		kinds++
		h.Typeflag, h.Mode, h.Name = tar.TypeDir, 0o755, h.Name+"/"
	}
	if f.Link != "" {
		kinds++
		h.Typeflag, h.Mode, h.Linkname = tar.TypeSymlink, 0o777, f.Link
	}
	if f.Content != nil {
		kinds++
		h.Typeflag, h.Mode, h.Size = tar.TypeReg, 0o644, int64(len(*f.Content))
		body = strings.NewReader(*f.Content)
	}
	if f.Source != "" {
		kinds++
		file, err := os.Open(f.Source)
		if err != nil {
			return err
		}
		defer file.Close()
		info, err := file.Stat()
		if err != nil {
			return err
		}
		if !info.Mode().IsRegular() {
			return fmt.Errorf("%s is not a regular file", f.Source)
		}
		h.Typeflag, h.Mode, h.Size = tar.TypeReg, 0o644, info.Size()
		if info.Mode()&0o100 != 0 {
			h.Mode = 0o755
		}
		body = file
	}
	if kinds != 1 {
		return fmt.Errorf("exactly one of source, content, link and directory is needed, not %d", kinds)
	}
	if f.Mode != "" {
		mode, err := strconv.ParseUint(f.Mode, 8, 12)
		if err != nil {
			return fmt.Errorf("mode %q: an octal number up to 7777 is needed", f.Mode)
		}
		h.Mode = int64(mode)
	}
	if len(f.Capabilities) > 0 {
		c, err := capabilities(f.Capabilities)
		if err != nil {
			return err
		}
		h.Format, h.PAXRecords = tar.FormatPAX, map[string]string{"SCHILY.xattr.security.capability": c}
	}
	if err := t.WriteHeader(h); err != nil {
		return err
	}
	_, err := io.Copy(t, body)
	return err
}

// capabilities is the extended attribute security.capability.
func capabilities(numbers []uint) (string, error) {
	var set uint64
	for _, n := range numbers {
		if n > capLast {
			return "", fmt.Errorf("capability %d: the highest is %d", n, capLast)
		}
		set |= 1 << n
	}
	var b bytes.Buffer
	// Permitted and inheritable, the low words of both before the high ones.
	for _, v := range []uint32{capRevision2, uint32(set), 0, uint32(set >> 32), 0} {
		if err := binary.Write(&b, binary.LittleEndian, v); err != nil {
			return "", err
		}
	}
	return b.String(), nil
}
