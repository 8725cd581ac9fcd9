package main

import (
	"cmp"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// metric is one family of metrics, as its literal defines it.
type metric struct {
	name, kind, help string
	labels           []string
	// served by manager, agent or both.
	by string
}

// constructors are the functions of prometheus/client_golang that make a
// metric, with the kind of what they make.
var constructors = map[string]string{
	"NewCounter": "counter", "NewCounterVec": "counter", "NewGauge": "gauge", "NewGaugeVec": "gauge",
	"NewHistogram": "histogram", "NewHistogramVec": "histogram",
}

// servers are the processes that serve the metrics of a directory.
var servers = map[string]string{".": "manager, agent", "controllers": "manager", "agent": "agent"}

// files parses the Go files of a directory that are no tests.
func files(root, dir string) ([]*ast.File, error) {
	names, err := filepath.Glob(filepath.Join(root, dir, "*.go"))
	if err != nil {
		return nil, err
	}
	var out []*ast.File
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			return nil, err
		}
		out = append(out, f)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("directory %s has no Go files; run this in the project's tree", filepath.Join(root, dir))
	}
	return out, nil
}

// metricsOf returns the metrics that the packages of dirs define, by name.
func metricsOf(root string, dirs []string) ([]metric, error) {
	var all []metric
	for _, dir := range dirs {
		parsed, err := files(root, dir)
		if err != nil {
			return nil, err
		}
		for _, f := range parsed {
			for n := range ast.Preorder(f) {
				call, ok := n.(*ast.CallExpr)
				if !ok {
					continue
				}
				fun, ok := call.Fun.(*ast.SelectorExpr)
				if !ok || fmt.Sprint(fun.X) != "prometheus" || constructors[fun.Sel.Name] == "" {
					continue
				}
				m, err := metricOf(call)
				if err != nil {
					return nil, fmt.Errorf("%s: prometheus.%s: %w", dir, fun.Sel.Name, err)
				}
				m.kind, m.by = constructors[fun.Sel.Name], servers[dir]
				if slices.ContainsFunc(all, func(o metric) bool { return o.name == m.name }) {
					return nil, fmt.Errorf("metric %s is defined twice", m.name)
				}
				all = append(all, m)
			}
		}
	}
	slices.SortFunc(all, func(a, b metric) int { return cmp.Compare(a.name, b.name) })
	return all, nil
}

// metricOf reads name, help and labels from a constructor's arguments.
func metricOf(call *ast.CallExpr) (metric, error) {
	var m metric
	opts, ok := call.Args[0].(*ast.CompositeLit)
	if !ok {
		return m, fmt.Errorf("its options are no literal")
	}
	for _, e := range opts.Elts {
		kv, ok := e.(*ast.KeyValueExpr)
		if !ok {
			return m, fmt.Errorf("its options have no names")
		}
		var err error
		switch fmt.Sprint(kv.Key) {
		case "Name":
			m.name, err = text(kv.Value)
		case "Help":
			m.help, err = text(kv.Value)
		case "Namespace", "Subsystem", "ConstLabels":
			err = fmt.Errorf("write %v out in its name or labels", kv.Key)
		}
		if err != nil {
			return m, err
		}
	}
	if m.name == "" || m.help == "" {
		return m, fmt.Errorf("it has no name or no help")
	}
	if len(call.Args) > 1 {
		labels, ok := call.Args[1].(*ast.CompositeLit)
		if !ok {
			return m, fmt.Errorf("the labels of %s are no literal", m.name)
		}
		for _, e := range labels.Elts {
			l, err := text(e)
			if err != nil {
				return m, err
			}
			m.labels = append(m.labels, l)
		}
	}
	return m, nil
}

// text is the value of a string literal, or of a sum of such.
func text(e ast.Expr) (string, error) {
	switch e := e.(type) {
	case *ast.BasicLit:
		return strconv.Unquote(e.Value)
	case *ast.BinaryExpr:
		x, err := text(e.X)
		if err != nil {
			return "", err
		}
		y, err := text(e.Y)
		return x + y, err
	}
	return "", fmt.Errorf("a string is no literal")
}

func metricsPage(all []metric) string {
	var b strings.Builder
	b.WriteString(`# Metrics

<!-- Written by hack/gendocs from the source of the metrics; run 'make generate' after a change there. -->

Manager and agent serve these at ` + "`/metrics`" + ` (` + "`--metrics-bind-address`" + `), besides those of controller-runtime and Go. Times are in
seconds, sizes in bytes. No label holds the name of a VM, pod or node. Of several managers only the one that acts counts, so sum over all.

| Metric | Type | Labels | Served by | Meaning |
|---|---|---|---|---|
`)
	for _, m := range all {
		labels := "-"
		if len(m.labels) > 0 {
			labels = "`" + strings.Join(m.labels, "`, `") + "`"
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s | %s |\n", m.name, m.kind, labels, m.by, cell(m.help))
	}
	b.WriteString(`
Reasons are those of [the conditions](conditions.md). The steps of a switchover are explained in [How the switchover works](../switchover.md).
`)
	return b.String()
}
