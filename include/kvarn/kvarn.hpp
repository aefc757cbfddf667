// SPDX-License-Identifier: Apache-2.0
#pragma once
// Everything for the CPU but a whole cache (cache/pool.hpp and its neighbours, docs/cache.md), files, the overloads that allocate
// (interop/owning.hpp) and the Eigen types (interop/eigen.hpp).
// Layers, lowest first: base, layout, simd, then rotate, normalize and codec, then convert.hpp,
// quantize.hpp and attention.hpp, then cache.

#include <kvarn/attention.hpp>
#include <kvarn/base/element.hpp>
#include <kvarn/base/status.hpp>
#include <kvarn/base/view.hpp>
#include <kvarn/cache/choose.hpp>
#include <kvarn/cache/policy.hpp>
#include <kvarn/codec/packing.hpp>
#include <kvarn/convert.hpp>
#include <kvarn/layout/format.hpp>
#include <kvarn/layout/record.hpp>
#include <kvarn/quantize.hpp>
#include <kvarn/rotate/hadamard.hpp>
#include <kvarn/scratch.hpp>
#include <kvarn/supports.hpp>
#include <kvarn/version.hpp>
