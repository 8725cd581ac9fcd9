package vfio

// Requests and structures of <linux/vfio.h> and <linux/iommufd.h>, under the
// kernel's names in Go's spelling. All requests are _IO(type, number), which
// carries neither size nor direction. The layouts are the kernel's on every
// 64-bit architecture: tests compare them.

const (
	vfioBase  = ';'<<8 + 100 // VFIO_TYPE, VFIO_BASE
	iommuBase = ';'<<8 + 0x80

	getAPIVersion     = vfioBase + 0
	checkExtension    = vfioBase + 1
	setIOMMU          = vfioBase + 2
	groupGetStatus    = vfioBase + 3
	groupSetContainer = vfioBase + 4
	groupGetDeviceFD  = vfioBase + 6
	deviceGetInfo     = vfioBase + 7
	deviceRegionInfo  = vfioBase + 8
	deviceIRQInfo     = vfioBase + 9
	deviceSetIRQs     = vfioBase + 10
	deviceReset       = vfioBase + 11
	iommuGetInfo      = vfioBase + 12
	iommuMapDMA       = vfioBase + 13
	iommuUnmapDMA     = vfioBase + 14
	// Since Linux 6.6.
	deviceBindIOMMUFD     = vfioBase + 18
	deviceAttachIOMMUFDPT = vfioBase + 19

	ioasAlloc      = iommuBase + 1
	ioasIOVARanges = iommuBase + 4
	ioasMap        = iommuBase + 5
	ioasUnmap      = iommuBase + 6
	hwptAlloc      = iommuBase + 9
	hwptSetDirty   = iommuBase + 11
	hwptGetDirty   = iommuBase + 12
)

const (
	apiVersion   = 0 // VFIO_API_VERSION
	type1v2IOMMU = 3 // VFIO_TYPE1v2_IOMMU

	groupViable = 1 << 0 // VFIO_GROUP_FLAGS_VIABLE

	deviceFlagReset = 1 << 0 // VFIO_DEVICE_FLAGS_RESET
	deviceFlagPCI   = 1 << 1 // VFIO_DEVICE_FLAGS_PCI

	regionBAR0   = 0 // VFIO_PCI_BAR0_REGION_INDEX
	regionConfig = 7 // VFIO_PCI_CONFIG_REGION_INDEX
	irqMSIX      = 2 // VFIO_PCI_MSIX_IRQ_INDEX
	irqRequest   = 4 // VFIO_PCI_REQ_IRQ_INDEX

	regionRead   = 1 << 0 // VFIO_REGION_INFO_FLAG_READ
	regionWrite  = 1 << 1
	regionMmap   = 1 << 2
	regionCaps   = 1 << 3
	capSparse    = 1      // VFIO_REGION_INFO_CAP_SPARSE_MMAP
	irqEventfd   = 1 << 0 // VFIO_IRQ_INFO_EVENTFD
	setDataNone  = 1 << 0 // VFIO_IRQ_SET_DATA_NONE
	setDataEvent = 1 << 2 // VFIO_IRQ_SET_DATA_EVENTFD
	setTrigger   = 1 << 5 // VFIO_IRQ_SET_ACTION_TRIGGER

	iommuInfoCaps = 1 << 1 // VFIO_IOMMU_INFO_CAPS
	capIOVARange  = 1      // VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE
	dmaRead       = 1 << 0 // VFIO_DMA_MAP_FLAG_READ
	dmaWrite      = 1 << 1 // VFIO_DMA_MAP_FLAG_WRITE

	mapFixedIOVA = 1 << 0 // IOMMU_IOAS_MAP_FIXED_IOVA
	mapWriteable = 1 << 1 // IOMMU_IOAS_MAP_WRITEABLE
	mapReadable  = 1 << 2 // IOMMU_IOAS_MAP_READABLE

	allocDirty  = 1 << 1 // IOMMU_HWPT_ALLOC_DIRTY_TRACKING
	dirtyEnable = 1      // IOMMU_HWPT_DIRTY_TRACKING_ENABLE
)

// groupStatus is struct vfio_group_status.
type groupStatus struct{ argsz, flags uint32 }

// deviceInfo is struct vfio_device_info.
type deviceInfo struct{ argsz, flags, numRegions, numIRQs, capOffset uint32 }

// regionInfo is struct vfio_region_info.
type regionInfo struct {
	argsz, flags, index, capOffset uint32
	size, offset                   uint64
}

// irqInfo is struct vfio_irq_info.
type irqInfo struct{ argsz, flags, index, count uint32 }

// irqSet is the head of struct vfio_irq_set, without its data.
type irqSet struct{ argsz, flags, index, start, count uint32 }

// typeInfo is struct vfio_iommu_type1_info; the kernel's ends at capOffset or
// 4 bytes of padding later, depending on its age.
type typeInfo struct {
	argsz, flags uint32
	pageSizes    uint64
	capOffset    uint32
	_            uint32
}

// dmaMap is struct vfio_iommu_type1_dma_map.
type dmaMap struct {
	argsz, flags      uint32
	vaddr, iova, size uint64
}

// dmaUnmap is the head of struct vfio_iommu_type1_dma_unmap, without data.
type dmaUnmap struct {
	argsz, flags uint32
	iova, size   uint64
}

// bindIOMMUFD is struct vfio_device_bind_iommufd.
type bindIOMMUFD struct {
	argsz, flags uint32
	iommufd      int32
	outDevID     uint32
}

// attachPT is struct vfio_device_attach_iommufd_pt as of Linux 6.6.
type attachPT struct{ argsz, flags, ptID uint32 }

// ioasAllocArg is struct iommu_ioas_alloc.
type ioasAllocArg struct{ size, flags, outID uint32 }

// iovaRange is struct iommu_iova_range and struct vfio_iova_range.
type iovaRange struct{ start, last uint64 }

// iovaRangesArg is struct iommu_ioas_iova_ranges.
type iovaRangesArg struct {
	size, ioasID, num, _ uint32
	allowed, alignment   uint64
}

// ioasMapArg is struct iommu_ioas_map.
type ioasMapArg struct {
	size, flags, ioasID, _ uint32
	userVA, length, iova   uint64
}

// ioasUnmapArg is struct iommu_ioas_unmap.
type ioasUnmapArg struct {
	size, ioasID uint32
	iova, length uint64
}

// hwptAllocArg is struct iommu_hwpt_alloc as of Linux 6.7.
type hwptAllocArg struct {
	size, flags, devID, ptID, outID, _, dataType, dataLen uint32
	dataUptr                                              uint64
}

// setDirtyArg is struct iommu_hwpt_set_dirty_tracking.
type setDirtyArg struct{ size, flags, hwptID, _ uint32 }

// getDirtyArg is struct iommu_hwpt_get_dirty_bitmap.
type getDirtyArg struct {
	size, hwptID, flags, _       uint32
	iova, length, pageSize, data uint64
}
