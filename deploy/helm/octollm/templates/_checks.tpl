{{/* Values that fit the schema and still cannot work. Included once, by the deployments. */}}
{{- define "octollm.checks" -}}
{{- if and (not .Values.gateway.hosts) (or .Values.gateway.ingress.enabled (ne .Values.gateway.service.type "ClusterIP")) -}}
{{- fail "gateway.hosts is empty: the gateway refuses a Host that is not listed, so name those that clients use, such as octollm.example.org" -}}
{{- end -}}
{{- if and .Values.tls.mutual (not .Values.tls.secret) -}}
{{- fail "tls.mutual needs tls.secret, a Secret with tls.crt, tls.key and ca.crt" -}}
{{- end -}}
{{- range $part, $model := dict "model" .Values.model "embedding" .Values.embedding -}}
{{- if and (hasPrefix "openai:" $model.name) (not $model.secret) (not $model.url) -}}
{{- fail (printf "%s.name is %s: it needs %s.secret (the provider's key), or %s.url of a server that asks for none" $part $model.name $part $part) -}}
{{- end -}}
{{- end -}}
{{- range $name, $_ := .Values.services -}}
{{- if not (hasKey (include "octollm.table" $ | fromYaml) $name) -}}
{{- fail (printf "services.%s is not a service of OctoLLM; an arm of your own belongs under arms" $name) -}}
{{- end -}}
{{- $own := include "octollm.service" (dict "root" $ "name" $name) | fromYaml -}}
{{- with $own.autoscaling -}}
{{- if gt (int .min) (int .max) -}}
{{- fail (printf "services.%s.autoscaling: min %d is greater than max %d" $name (int .min) (int .max)) -}}
{{- end -}}
{{- if not (or .cpu .inFlight .waiting) -}}
{{- fail (printf "services.%s.autoscaling names no metric: set cpu, inFlight or waiting" $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $models := include "octollm.service" (dict "root" . "name" "models") | fromYaml -}}
{{- if and (hasPrefix "embedded" .Values.model.name) (not .Values.model.cache.existingClaim) (or (gt (int $models.replicas) 1) $models.autoscaling) -}}
{{- fail "several replicas of models need one volume that all can mount: set model.cache.existingClaim to a claim with ReadWriteMany or ReadOnlyMany, or use one replica" -}}
{{- end -}}
{{- if and .Values.gateway.ingress.enabled .Values.tls.mutual (not .Values.gateway.ingress.annotations) -}}
{{- fail "gateway.ingress with TLS between the services: set the annotation with which your controller speaks HTTPS to the gateway" -}}
{{- end -}}
{{- range $name, $arm := .Values.arms -}}
{{- if hasKey (include "octollm.table" $ | fromYaml) $name -}}
{{- fail (printf "arms.%s has the name of a built-in service" $name) -}}
{{- end -}}
{{- range $called := $arm.calls -}}
{{- $family := splitList ":" $called | first -}}
{{- if not (or (hasKey (include "octollm.table" $ | fromYaml) $family) (hasKey $.Values.arms $family) (has $family (list "tasks" "files" "events" "arms" "webhooks" "keys" "audit"))) -}}
{{- fail (printf "arms.%s calls %s, but %s is neither a service nor an arm" $name $called $family) -}}
{{- end -}}
{{- end -}}
{{- if and (gt (int (default 1 $arm.replicas)) 1) (not (dig "storage" "existingClaim" "" $arm)) -}}
{{- fail (printf "arms.%s: replicas share the key that the arm enrolled with, so set arms.%s.storage.existingClaim to a claim with ReadWriteMany, or use one replica" $name $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
