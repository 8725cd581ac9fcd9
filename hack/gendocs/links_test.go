package main

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// link is a link of Markdown to a place within the tree.
var link = regexp.MustCompile(`\]\(([^)#:\s]+)(#[^)\s]*)?\)`)

// broken returns the links of a page to files that do not exist.
func broken(page string) ([]string, int, error) {
	text, err := os.ReadFile(page)
	if err != nil {
		return nil, 0, err
	}
	var bad []string
	found := link.FindAllStringSubmatch(string(text), -1)
	for _, l := range found {
		if _, err := os.Stat(filepath.Join(filepath.Dir(page), l[1])); err != nil {
			bad = append(bad, l[1])
		}
	}
	return bad, len(found), nil
}

// TestLinks: every relative link of the documentation leads somewhere, and
// every page but the runbooks is linked from the first one.
func TestLinks(t *testing.T) {
	pages := []string{filepath.Join(root, "README.md")}
	if err := filepath.WalkDir(filepath.Join(root, "docs"), func(path string, d fs.DirEntry, err error) error {
		if err == nil && filepath.Ext(path) == ".md" {
			pages = append(pages, path)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	index, err := os.ReadFile(filepath.Join(root, "docs/README.md"))
	if err != nil {
		t.Fatal(err)
	}
	links := 0
	for _, page := range pages {
		bad, n, err := broken(page)
		if err != nil {
			t.Fatal(err)
		}
		links += n
		for _, l := range bad {
			t.Errorf("%s: link to %s, which does not exist", page, l)
		}
		rel, err := filepath.Rel(filepath.Join(root, "docs"), page)
		if err != nil {
			t.Fatal(err)
		}
		if rel != "README.md" && rel != "../README.md" && !strings.HasPrefix(rel, "runbooks/") && !strings.Contains(string(index), "("+rel+")") {
			t.Errorf("docs/README.md does not link to %s", rel)
		}
	}
	if links == 0 {
		t.Error("no page has a link")
	}
	page := filepath.Join(t.TempDir(), "a.md")
	if err := os.WriteFile(page, []byte("[a](a.md#x) [b](b.md) [c](https://c.example/)"), 0o600); err != nil {
		t.Fatal(err)
	}
	if bad, n, err := broken(page); err != nil || n != 2 || len(bad) != 1 || bad[0] != "b.md" {
		t.Errorf("of two links, one of them broken: %v of %d, %v", bad, n, err)
	}
}
