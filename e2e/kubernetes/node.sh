#!/bin/bash
# Process 1 of a node: gives itself a root file system made of the tree of
# programs and the node's own state, and runs containerd, kubelet and
# kube-proxy. It runs in mount, host name, IPC, process and control group
# namespaces of its own, which end with it.
set -euo pipefail
: "${NODE:?} ${NODE_IP:?} ${POD_CIDR:?} ${STATE:?} ${TREE:?} ${PROGRAMS:?} ${STORE:?} ${IMAGES:?} ${CLUSTER_CIDR:?}"

controllers=(cpu cpuacct cpuset memory devices freezer blkio pids)
root="$STATE/root"

hostname "$NODE"
mount --make-rprivate /
mkdir -p "$STATE"/{upper,work,root,containerd,kubelet}
mount -t overlay overlay -o "lowerdir=$TREE,upperdir=$STATE/upper,workdir=$STATE/work" "$root"

mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount -t tmpfs -o mode=755 tmpfs "$root/sys/fs/cgroup"
for c in "${controllers[@]}"; do
    mkdir "$root/sys/fs/cgroup/$c"
    mount -t cgroup -o "$c" cgroup "$root/sys/fs/cgroup/$c"
done
mkdir "$root/sys/fs/cgroup/systemd"
mount -t cgroup -o none,name=systemd cgroup "$root/sys/fs/cgroup/systemd"

mount -t tmpfs -o mode=755 tmpfs "$root/dev"
device() { mknod -m "$2" "$root/dev/$1" c "$3" "$4"; }
mkdir "$root"/dev/{net,pts,shm,mqueue}
device null 666 1 3
device zero 666 1 5
device full 666 1 7
device random 666 1 8
device urandom 666 1 9
device kmsg 644 1 11
device tty 666 5 0
device fuse 666 10 229
device net/tun 666 10 200
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts "$root/dev/pts"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
mount -t mqueue mqueue "$root/dev/mqueue"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
ln -s fd/0 "$root/dev/stdin"
ln -s fd/1 "$root/dev/stdout"
ln -s fd/2 "$root/dev/stderr"

# store has containerd find what was unpacked before: its databases are this node's
# own copies, blobs and layers, which it does not change, are seen as they are.
store() {
    local to="$root/var/lib/containerd" content=io.containerd.content.v1.content layers=io.containerd.snapshotter.v1.overlayfs seen from
    mkdir -p "$to/$content/blobs/sha256" "$to/$layers/snapshots"
    cp -r "$STORE/io.containerd.metadata.v1.bolt" "$to"
    cp "$STORE/$layers/metadata.db" "$to/$layers"
    for from in "$STORE/$content"/blobs/sha256/* "$STORE/$layers"/snapshots/*; do
        seen="$to/${from#"$STORE/"}"
        if [[ -d "$from" ]]; then mkdir "$seen"; else : >"$seen"; fi
        mount --bind "$from" "$seen"
        mount -o remount,bind,ro "$seen"
    done
}

mount -t tmpfs -o mode=755 tmpfs "$root/run"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
# containerd's snapshots are overlays, which cannot be stacked on one.
mkdir -p "$root"/var/{lib/containerd,lib/kubelet,log/pods,run} "$root"/opt/{kubernetes,images,cni/bin} "$root/oldroot" \
    "$root"/etc/{cni/net.d,containerd,kubernetes}
mount --bind "$STATE/containerd" "$root/var/lib/containerd"
store
mount --bind "$STATE/kubelet" "$root/var/lib/kubelet"
mount --bind "$PROGRAMS" "$root/opt/kubernetes"
mount --bind "$IMAGES" "$root/opt/images"
mount --bind "$STATE/etc" "$root/etc/kubernetes"

# pivot_root refuses a root that is shared with others, pods need one that is.
cd "$root"
pivot_root . oldroot
cd /
umount -l /oldroot
mount --make-rshared /
hash -r
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root

# The kubelet wants some of the machine's settings changed, which are not this
# node's to change: it is shown the values that it wants.
mkdir /run/sysctl
setting() {
    local file="/run/sysctl/${1//\//.}"
    echo "$2" >"$file"
    mount --bind "$file" "/proc/sys/$1"
}
setting vm/overcommit_memory 1
setting vm/panic_on_oom 0
setting kernel/panic 10
setting kernel/panic_on_oops 1
setting kernel/keys/root_maxkeys 1000000
setting kernel/keys/root_maxbytes 25000000
echo 1 >/proc/sys/net/ipv4/ip_forward

: >/etc/resolv.conf
printf '127.0.0.1 localhost\n%s %s\n' "$NODE_IP" "$NODE" >/etc/hosts
printf '%s' "$NODE" | md5sum | cut -c1-32 >/etc/machine-id

cat >/etc/cni/net.d/10-pods.conflist <<END
{"cniVersion": "1.0.0", "name": "pods", "plugins": [
  {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false, "hairpinMode": true,
   "ipam": {"type": "host-local", "ranges": [[{"subnet": "$POD_CIDR"}]], "routes": [{"dst": "0.0.0.0/0"}]}}]}
END
cat >/etc/containerd/config.toml <<'END'
version = 3
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = 'localhost/pause:1'
[plugins.'io.containerd.cri.v1.runtime']
  # This may lack the right to lower a process's oom_score_adj.
  restrict_oom_score_adj = true
  device_ownership_from_security_context = true
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
    runtime_type = 'io.containerd.runc.v2'
    [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
      SystemdCgroup = false
  [plugins.'io.containerd.cri.v1.runtime'.cni]
    bin_dirs = ['/opt/cni/bin', '/usr/lib/cni']
    conf_dir = '/etc/cni/net.d'
END

# supervise NAME COMMAND...: runs a daemon whose end is the node's.
supervise() {
    local name="$1"
    shift
    { "$@" >"/var/log/$name.log" 2>&1; echo "$name ended with status $?" >&2; kill -TERM 1; } &
}
trap 'exit 1' TERM

supervise containerd containerd
for ((n = 0; ; n++)); do
    if ctr version >/dev/null 2>&1; then break; fi
    if ((n == 600)); then
        echo "containerd does not answer" >&2
        exit 1
    fi
    sleep 0.1
done
import() {
    local archive
    for archive in /opt/images/*.tar; do
        ctr -n k8s.io images import "$archive" >>/var/log/import.log 2>&1 || return
    done
    # A pod that must run the very image of another names it by its digest.
    ctr -n k8s.io images ls | while read -r name _ digest _; do
        if [[ "$digest" != sha256:* || "$name" == sha256:* || "$name" == *@* ]]; then continue; fi
        ctr -n k8s.io images tag --force "$name" "${name%:*}@$digest" >>/var/log/import.log 2>&1 || return
    done
}
import
echo "images imported" >&2
supervise kube-proxy /opt/kubernetes/kube-proxy --kubeconfig=/etc/kubernetes/kube-proxy.kubeconfig --hostname-override="$NODE" \
    --proxy-mode=nftables --cluster-cidr="$CLUSTER_CIDR" --conntrack-max-per-core=0 \
    --conntrack-tcp-timeout-established=0 --conntrack-tcp-timeout-close-wait=0
supervise kubelet /opt/kubernetes/kubelet --config=/etc/kubernetes/kubelet.yaml --kubeconfig=/etc/kubernetes/kubelet.kubeconfig \
    --hostname-override="$NODE" --node-ip="$NODE_IP" --root-dir=/var/lib/kubelet -v=2
while :; do wait -n || :; done
