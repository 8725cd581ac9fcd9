package main

import (
	"fmt"
	"go/ast"
	"go/token"
	"strings"
)

// constant is a documented constant of the API.
type constant struct {
	// name in the source, value as it is written in objects.
	name, value, doc string
	// dir is the directory of its package.
	dir string
	// group is the comment of the declaration that it is in.
	group string
}

// constantsOf returns the exported constants that are conditions' types and
// reasons, and those of events, in the order of the source. One without a comment is an error,
// unless it follows one that is explained together with it.
func constantsOf(root string, dirs []string) ([]constant, error) {
	var all []constant
	for _, dir := range dirs {
		parsed, err := files(root, dir)
		if err != nil {
			return nil, err
		}
		for _, f := range parsed {
			for _, d := range f.Decls {
				decl, ok := d.(*ast.GenDecl)
				if !ok || decl.Tok != token.CONST {
					continue
				}
				found, err := constantsIn(decl)
				if err != nil {
					return nil, fmt.Errorf("%s: %w", dir, err)
				}
				for i := range found {
					found[i].dir = dir
				}
				all = append(all, found...)
			}
		}
	}
	return all, nil
}

func constantsIn(decl *ast.GenDecl) ([]constant, error) {
	var all []constant
	together := ""
	for _, s := range decl.Specs {
		spec, ok := s.(*ast.ValueSpec)
		if !ok || len(spec.Names) != 1 || len(spec.Values) != 1 {
			continue
		}
		name := spec.Names[0].Name
		if !strings.HasPrefix(name, "Condition") && !strings.HasPrefix(name, "Reason") && !strings.HasPrefix(name, "Event") {
			continue
		}
		value, err := text(spec.Values[0])
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		doc := spec.Doc.Text()
		if doc == "" && strings.Contains(together, name) {
			doc = together
		}
		if doc == "" {
			return nil, fmt.Errorf("%s has no comment", name)
		}
		together = doc
		all = append(all, constant{name: name, value: value, doc: doc, group: decl.Doc.Text()})
	}
	return all, nil
}

// meaning is a constant's comment without the name that it begins with, and
// with the values of others instead of their names.
func (c constant) meaning(all []constant) string {
	doc := strings.Join(strings.Fields(c.doc), " ")
	if rest := strings.TrimPrefix(doc, c.name); !strings.HasPrefix(rest, " and ") {
		doc = strings.TrimSpace(strings.TrimPrefix(strings.TrimPrefix(rest, ":"), " is "))
	}
	for _, o := range all { // no name is the beginning of another one
		doc = strings.ReplaceAll(doc, o.name, "`"+o.value+"`")
	}
	if first, _, _ := strings.Cut(doc, " "); !strings.Contains(first, ".") { // a field's name stays as it is
		doc = strings.ToUpper(doc[:1]) + doc[1:]
	}
	return cell(doc)
}

func conditionsPage(all []constant) (string, error) {
	sections := []struct {
		title, intro string
		take         func(constant) bool
	}{
		{"Conditions of a VFMigration", "Each is written by one party only. One that is not listed in an object was not written yet.",
			func(c constant) bool {
				return strings.HasPrefix(c.name, "Condition") && strings.Contains(c.group, "VFMigration")
			}},
		{"Reasons of a VFMigration", "Of its conditions and of `status.failure`. A condition that is True for the plain reason has its own type as reason.",
			func(c constant) bool {
				return strings.HasPrefix(c.name, "Reason") && c.dir == conditionDirs[0] && !strings.Contains(c.group, "that are not of package")
			}},
		{"Conditions of a VFNode", "Written by the node's agent. An agent that died cannot say so: its Lease is no longer renewed then.",
			func(c constant) bool {
				return strings.HasPrefix(c.name, "Condition") && !strings.Contains(c.group, "VFMigration")
			}},
		{"Reasons of a VFNode", "A condition that is True for the plain reason has its own type as reason.",
			func(c constant) bool {
				return strings.HasPrefix(c.name, "Reason") && (c.dir != conditionDirs[0] || strings.Contains(c.group, "that are not of package"))
			}},
		{"Events of a VFNode", "Warnings of the node's agent about connections with other agents; its log has each.",
			func(c constant) bool { return strings.HasPrefix(c.name, "Event") }},
	}
	var b strings.Builder
	b.WriteString(`# Conditions and reasons

<!-- Written by hack/gendocs from the comments of the constants in the API; run 'make generate' after a change there. -->

What to do about a failure is in [Failure and recovery](../failures.md).
`)
	for _, s := range sections {
		fmt.Fprintf(&b, "\n## %s\n\n%s\n\n| Value | Meaning |\n|---|---|\n", s.title, s.intro)
		n := 0
		for _, c := range all {
			if s.take(c) {
				fmt.Fprintf(&b, "| `%s` | %s |\n", c.value, c.meaning(all))
				n++
			}
		}
		if n == 0 {
			return "", fmt.Errorf("section %q is empty: the comments of the declarations have changed", s.title)
		}
	}
	return b.String(), nil
}
