{{- /* Names are fixed: CompSC is installed once in a cluster, as its CRDs are,
       and Helm refuses a second release that would own the same objects. */ -}}

{{- define "compsc.labels" -}}
app.kubernetes.io/name: compsc
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- /* component: dict "root" $ "component" name */ -}}
{{- define "compsc.selector" -}}
app.kubernetes.io/name: compsc
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "compsc.componentLabels" -}}
{{ include "compsc.labels" .root }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "compsc.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}
{{- end -}}
{{- end -}}
{{- end }}

{{- /* The objects of the files that match .glob, with the chart's labels, in
       the release's namespace. .keep adds Helm's annotation that keeps them.
       The files come from config/, by `make generate`. */ -}}
{{- define "compsc.objects" -}}
{{- $root := .root -}}
{{- $labels := include "compsc.labels" $root | fromYaml -}}
{{- $keep := .keep -}}
{{- range $path, $bytes := $root.Files.Glob .glob }}
{{- $text := toString $bytes | replace "compsc-system" $root.Release.Namespace }}
{{- range regexSplit "(?m)^---\\s*$" $text -1 }}
{{- $o := fromYaml . }}
{{- if $o }}
{{- if hasKey $o "Error" }}{{ fail (printf "%s: %s" $path $o.Error) }}{{ end }}
{{- $m := $o.metadata }}
{{- $_ := set $m "labels" (merge (dict) $labels ($m.labels | default dict)) }}
{{- if $keep }}
{{- $_ := set $m "annotations" (merge (dict "helm.sh/resource-policy" "keep") ($m.annotations | default dict)) }}
{{- end }}
---
{{ toYaml $o }}
{{ end }}
{{- end }}
{{- end }}
{{- end }}
